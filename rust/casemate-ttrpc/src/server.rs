//! A server for one connection, run by the thread that calls it.
//!
//! It reads requests and hands each to the [`Handler`] with a [`Responder`]; where the work is done (at once, in a queue,
//! on a thread of its own) is the handler's choice, answers go out in any order. It has no threads and does not accept.
//!
//! Bounds: what a peer can make this side hold is [`MAX_OPEN_CALLS`] and [`MAX_OPEN_BYTES`]; an answer is written by the
//! thread that gives it, which waits for the peer to read, so answers are never queued.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};
use prost::Message;

use crate::error::TtrpcError;
use crate::frame::{
    FLAG_REMOTE_OPEN, Frame, FrameDecoder, FrameError, FrameHeader, FrameKind, MAX_DATA_BYTES, StreamId,
};
use crate::message::{Code, Request, Response, Status, response_prefix};
use crate::wire::{poll_timeout, receive, send_all};

/// Most calls that one connection may have unanswered; more are answered ResourceExhausted.
pub const MAX_OPEN_CALLS: usize = 4096;

/// Most bytes of request payloads that one connection may have unanswered; more are answered ResourceExhausted.
pub const MAX_OPEN_BYTES: usize = 64 << 20;

/// A peer that reads nothing for so long, while an answer waits for it, is given up and the connection broken. Long,
/// because an owner may be stopped for a while (a debugger, a suspended host) and goes on afterwards.
pub const STALL_LIMIT: Duration = Duration::from_secs(600);

/// Answers requests.
pub trait Handler: Send + Sync {
    /// Takes one request; called on the reading thread, which reads on when it returns. The answer goes through
    /// `responder`, now or later, from any thread.
    fn handle(&self, request: ServerRequest, responder: Responder);

    /// The connection is over; called once, on the reading thread, after the last [`Handler::handle`].
    fn connection_closed(&self, _connection: &ConnectionHandle) {}
}

/// A request as it came.
#[derive(Debug)]
#[non_exhaustive]
pub struct ServerRequest {
    /// Its stream, unique on the connection while it is open.
    pub stream: StreamId,
    /// Full name of the service (`grpc.AgentService`).
    pub service: String,
    /// Name of the method.
    pub method: String,
    /// The request message, encoded.
    pub payload: Vec<u8>,
    /// The time that the caller gives it. At its end the caller is answered DeadlineExceeded, whatever the handler does.
    pub timeout: Option<Duration>,
    /// Keys and values beside the request, for instance a trace context.
    pub metadata: Vec<(String, String)>,
    /// The connection it came on.
    pub connection: ConnectionHandle,
}

/// A connection as handlers see it; clones are the same connection.
#[derive(Clone, Debug)]
pub struct ConnectionHandle(Arc<Shared>);

impl ConnectionHandle {
    /// Whether the connection is over: nobody hears an answer.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    /// A descriptor that becomes readable, for good, when the connection is over. Don't read from it.
    #[must_use]
    pub fn closed_event(&self) -> BorrowedFd<'_> {
        self.0.closed_event.as_fd()
    }

    /// Ends the connection: reading stops, [`serve_connection`] returns.
    pub fn shut_down(&self) {
        self.0.shut_down();
    }

    /// Whether both are the same connection.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The right to answer one request, once. Dropped without an answer it answers Internal.
#[derive(Debug)]
pub struct Responder {
    shared: Arc<Shared>,
    stream: StreamId,
    used: bool,
}

impl Responder {
    /// Answers with an encoded response message. Blocks while the peer doesn't read.
    ///
    /// A payload that is too large for a frame is answered ResourceExhausted instead.
    pub fn ok(mut self, payload: Vec<u8>) {
        self.used = true;
        let prefix = response_prefix(payload.len());
        if prefix.len() + payload.len() > MAX_DATA_BYTES {
            let text = format!("the answer has {} bytes, at most {MAX_DATA_BYTES} fit", payload.len());
            self.shared.answer_status(self.stream, Status::new(Code::ResourceExhausted, text));
        } else {
            self.shared.answer(self.stream, &prefix, &payload);
        }
    }

    /// Answers with an error status. Blocks while the peer doesn't read.
    pub fn error(mut self, status: Status) {
        self.used = true;
        self.shared.answer_status(self.stream, status);
    }

    /// Whether an answer would still be heard: the connection is there and the caller's time has not run out.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.shared.lock_calls().by_stream.contains_key(&self.stream)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.used {
            let text = "the request was dropped without an answer";
            self.shared.answer_status(self.stream, Status::new(Code::Internal, text));
        }
    }
}

#[derive(Debug)]
struct OpenCall {
    payload_bytes: usize,
    deadline: Option<Instant>,
}

#[derive(Debug, Default)]
struct OpenCalls {
    by_stream: HashMap<StreamId, OpenCall>,
    payload_bytes: usize,
}

impl OpenCalls {
    fn remove(&mut self, stream: StreamId) -> bool {
        let Some(call) = self.by_stream.remove(&stream) else { return false };
        self.payload_bytes -= call.payload_bytes;
        true
    }
}

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    closed: AtomicBool,
    closed_event: EventFd,
    writer: Mutex<()>,
    calls: Mutex<OpenCalls>,
}

impl Shared {
    fn lock_calls(&self) -> MutexGuard<'_, OpenCalls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the answer if the call is open still, and closes it.
    fn answer(&self, stream: StreamId, prefix: &[u8], payload: &[u8]) {
        if self.lock_calls().remove(stream) {
            self.write_response(stream, prefix, payload);
        }
    }

    fn answer_status(&self, stream: StreamId, status: Status) {
        if self.lock_calls().remove(stream) {
            self.write_status(stream, status);
        }
    }

    /// Sends a status on a stream that need not be open.
    fn write_status(&self, stream: StreamId, mut status: Status) {
        // An error text is for people: never let its length decide whether it arrives.
        const MAX_TEXT_BYTES: usize = 64 << 10;
        if status.message.len() > MAX_TEXT_BYTES {
            let cut =
                (0..=MAX_TEXT_BYTES).rev().find(|cut| status.message.is_char_boundary(*cut)).unwrap_or(0);
            status.message.truncate(cut);
        }
        let mut data = Response { status: Some(status), payload: Vec::new() }.encode_to_vec();
        if data.len() > MAX_DATA_BYTES {
            let status = Status::new(Code::ResourceExhausted, "the error's details don't fit into a frame");
            data = Response { status: Some(status), payload: Vec::new() }.encode_to_vec();
        }
        self.write_response(stream, &data, &[]);
    }

    fn write_response(&self, stream: StreamId, prefix: &[u8], payload: &[u8]) {
        let data_bytes = u32::try_from(prefix.len() + payload.len()).unwrap_or(u32::MAX);
        let header = FrameHeader { data_bytes, stream, kind: FrameKind::Response, flags: 0 }.encode();
        let result = {
            let _one_frame_at_a_time = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            send_all(self.socket.as_fd(), &[&header, prefix, payload], STALL_LIMIT)
        };
        if let Err(error) = result {
            // Part of a frame may be out: nothing that follows would be understood.
            log::warn!("answer on stream {stream} could not be sent, connection ended: {error}");
            self.shut_down();
        }
    }

    fn shut_down(&self) {
        if let Err(errno) = shutdown(self.socket.as_raw_fd(), Shutdown::Both) {
            log::debug!("shutdown of a connection failed: {errno}");
        }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Err(errno) = self.closed_event.write(1) {
            log::error!("closing event could not be set: {errno}");
        }
        self.shut_down();
        *self.lock_calls() = OpenCalls::default();
    }
}

/// Serves the connected stream socket until the peer closes it or [`ConnectionHandle::shut_down`] is called.
///
/// Blocks: the calling thread is the connection's reader. The socket must be in blocking mode. Answers that are given
/// after it returned are dropped; a thread that blocks in an answer then is released.
///
/// # Errors
/// [`TtrpcError::Io`] when the socket fails. The end of the stream is no error.
pub fn serve_connection(stream: OwnedFd, handler: &Arc<dyn Handler>) -> Result<(), TtrpcError> {
    let closed_event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|errno| TtrpcError::io("eventfd", errno))?;
    let shared = Arc::new(Shared {
        socket: stream,
        closed: AtomicBool::new(false),
        closed_event,
        writer: Mutex::new(()),
        calls: Mutex::new(OpenCalls::default()),
    });
    let mut reader = Reader { shared: Arc::clone(&shared), handler, deadlines: BinaryHeap::new() };
    let result = reader.run();
    shared.close();
    handler.connection_closed(&ConnectionHandle(shared));
    result
}

struct Reader<'a> {
    shared: Arc<Shared>,
    handler: &'a Arc<dyn Handler>,
    /// Calls with a deadline, also those that have been answered since.
    deadlines: BinaryHeap<Reverse<(Instant, StreamId)>>,
}

impl Reader<'_> {
    fn run(&mut self) -> Result<(), TtrpcError> {
        let mut decoder = FrameDecoder::new();
        loop {
            if !self.receive_into(&mut decoder)? {
                return Ok(());
            }
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => self.take(&frame),
                    Ok(None) => break,
                    Err(error @ FrameError::TooLarge { stream, .. }) => {
                        let status = Status::new(Code::ResourceExhausted, error.to_string());
                        self.shared.write_status(stream, status);
                    }
                }
            }
        }
    }

    /// Waits for bytes, answering the calls whose time runs out; false at the end of the stream.
    fn receive_into(&mut self, decoder: &mut FrameDecoder) -> Result<bool, TtrpcError> {
        let shared = Arc::clone(&self.shared);
        let socket = shared.socket.as_fd();
        loop {
            let mut flags = MsgFlags::empty();
            if let Some(deadline) = self.expire_calls() {
                let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
                match poll(&mut fds, poll_timeout(deadline)) {
                    Ok(0) | Err(Errno::EINTR) => continue,
                    Ok(_) => flags = MsgFlags::MSG_DONTWAIT,
                    Err(errno) => return Err(TtrpcError::io("poll", errno)),
                }
            }
            match receive(socket, decoder.space(), flags) {
                Ok(0) => return Ok(false),
                Ok(bytes) => {
                    decoder.filled(bytes);
                    return Ok(true);
                }
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(TtrpcError::io("recv", errno)),
            }
        }
    }

    /// Answers calls whose time is over and returns the next deadline of an open call.
    fn expire_calls(&mut self) -> Option<Instant> {
        let now = if self.deadlines.is_empty() { return None } else { Instant::now() };
        while let Some(Reverse((deadline, stream))) = self.deadlines.peek().copied() {
            let mut calls = self.shared.lock_calls();
            let is_open = calls.by_stream.get(&stream).is_some_and(|call| call.deadline == Some(deadline));
            if is_open && deadline > now {
                return Some(deadline);
            }
            self.deadlines.pop();
            if is_open {
                calls.remove(stream);
                drop(calls);
                self.shared.write_status(stream, Status::new(Code::DeadlineExceeded, "timeout"));
            }
        }
        None
    }

    fn take(&mut self, frame: &Frame<'_>) {
        let FrameHeader { stream, kind, flags, .. } = frame.header;
        if kind != FrameKind::Request {
            log::debug!("frame of kind {} on stream {stream} ignored", kind.wire());
            return;
        }
        match self.open_call(stream, flags, frame.data) {
            Ok(request) => {
                let responder = Responder { shared: Arc::clone(&self.shared), stream, used: false };
                self.handler.handle(request, responder);
            }
            Err(status) => self.shared.write_status(stream, status),
        }
    }

    fn open_call(&mut self, stream: StreamId, flags: u8, data: &[u8]) -> Result<ServerRequest, Status> {
        if stream.0.is_multiple_of(2) {
            return Err(Status::new(Code::InvalidArgument, "stream id must be odd"));
        }
        let request = Request::decode(data).map_err(|error| {
            Status::new(Code::InvalidArgument, format!("request can't be decoded: {error}"))
        })?;
        if flags & FLAG_REMOTE_OPEN != 0 {
            let text = format!("{} method takes one message, not a stream", request.method);
            return Err(Status::new(Code::Unimplemented, text));
        }
        let timeout =
            u64::try_from(request.timeout_nano).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos);
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.register(stream, OpenCall { payload_bytes: request.payload.len(), deadline })?;
        if let Some(deadline) = deadline {
            self.deadlines.push(Reverse((deadline, stream)));
        }
        Ok(ServerRequest {
            stream,
            service: request.service,
            method: request.method,
            payload: request.payload,
            timeout,
            metadata: request.metadata.into_iter().map(|pair| (pair.key, pair.value)).collect(),
            connection: ConnectionHandle(Arc::clone(&self.shared)),
        })
    }

    fn register(&self, stream: StreamId, call: OpenCall) -> Result<(), Status> {
        let mut calls = self.shared.lock_calls();
        if calls.by_stream.contains_key(&stream) {
            return Err(Status::new(Code::InvalidArgument, "stream id is in use"));
        }
        let (open, open_bytes) = (calls.by_stream.len(), calls.payload_bytes);
        if open >= MAX_OPEN_CALLS || open_bytes + call.payload_bytes > MAX_OPEN_BYTES {
            let text = format!("{open} calls with {open_bytes} bytes are open on the connection");
            return Err(Status::new(Code::ResourceExhausted, text));
        }
        calls.payload_bytes += call.payload_bytes;
        calls.by_stream.insert(stream, call);
        Ok(())
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
