//! Streams of a process: what it writes, read on request, and what it reads, written on request.
//!
//! Requests on one stream are served in the order they came. What a process has written stays in its pipe until somebody
//! asks for it, so nothing is lost and nothing is buffered here.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use casemate_proto::grpc::{ReadStreamResponse, WriteStreamResponse};
use casemate_ttrpc::{Code, Responder, Status};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::EpollFlags;
use nix::sys::termios::{LocalFlags, SpecialCharacterIndices, tcgetattr};
use prost::Message;

use crate::error::{AgentError, Context, Result};
use crate::pump::{Pump, Source, next_source_id};

/// Most bytes of one answer, whatever the caller asks for.
pub const MAX_READ_BYTES: usize = 1 << 20;

/// From here on an answer counts as large.
const BULK_BYTES: usize = 4096;

nix::ioctl_read_bad!(readable_bytes, libc::FIONREAD, libc::c_int);

/// Whoever waits on a stream: the right to answer, and the pump of its connection.
#[derive(Debug)]
pub struct Caller {
    /// To be answered.
    pub responder: Responder,
    /// Where waiting is done.
    pub pump: Arc<Pump>,
}

/// Let a descriptor never block its reader.
pub fn set_nonblocking(fd: &OwnedFd) -> Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).context("fcntl", "stream")?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).context("fcntl", "stream").map(drop)
}

struct PendingRead {
    caller: Caller,
    max_bytes: usize,
}

#[derive(Default)]
struct OutputState {
    queue: VecDeque<PendingRead>,
    watched_by: Option<Arc<Pump>>,
    /// Whether the last answer was large: more is likely to be on its way.
    is_bulk: bool,
    /// From here on an empty pipe counts as its end, although somebody may still hold it.
    end_when_empty_from: Option<Instant>,
}

/// Standard output or error of a process, or its terminal.
pub struct OutputStream {
    id: u64,
    fd: OwnedFd,
    state: Mutex<OutputState>,
}

impl std::fmt::Debug for OutputStream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("OutputStream").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl OutputStream {
    /// Own the reading end.
    pub fn new(fd: OwnedFd) -> Result<Arc<Self>> {
        set_nonblocking(&fd)?;
        Ok(Arc::new(Self { id: next_source_id(), fd, state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answer with what is there, as soon as something is; empty at the end.
    pub fn read(self: &Arc<Self>, caller: Caller, wanted_bytes: u32) {
        let max_bytes = usize::try_from(wanted_bytes).unwrap_or(MAX_READ_BYTES).clamp(1, MAX_READ_BYTES);
        let mut state = self.lock();
        state.queue.push_back(PendingRead { caller, max_bytes });
        self.serve(&mut state);
        self.keep_watched(&mut state);
    }

    /// The process is over and its end has been told: an empty pipe is at its end after `deadline`.
    pub fn end_when_empty_from(&self, deadline: Instant) {
        let mut state = self.lock();
        state.end_when_empty_from.get_or_insert(deadline);
        if let Some(pump) = &state.watched_by {
            pump.set_deadline(self.id, deadline);
        }
    }

    /// Answer in order as long as there is something to answer with.
    fn serve(&self, state: &mut OutputState) {
        while let Some(front) = state.queue.front() {
            if !front.caller.responder.is_wanted() {
                state.queue.pop_front();
                continue;
            }
            let max_bytes = front.max_bytes;
            if state.is_bulk {
                self.let_writer_on(max_bytes);
            }
            let result = match self.try_read(max_bytes) {
                Err(Errno::EAGAIN)
                    if state.end_when_empty_from.is_some_and(|from| from <= Instant::now()) =>
                {
                    Ok(Vec::new())
                }
                Err(Errno::EAGAIN) => return,
                other => other,
            };
            let Some(front) = state.queue.pop_front() else { return };
            match result {
                Ok(data) => {
                    state.is_bulk = data.len() >= BULK_BYTES;
                    front.caller.responder.ok(ReadStreamResponse { data }.encode_to_vec());
                }
                Err(errno) => {
                    front.caller.responder.error(AgentError::system("read", "stream", errno).into())
                }
            }
        }
    }

    fn ready_bytes(&self) -> nix::Result<usize> {
        let mut ready: libc::c_int = 0;
        // SAFETY: an open descriptor and a live number.
        unsafe { readable_bytes(self.fd.as_raw_fd(), &raw mut ready) }?;
        Ok(usize::try_from(ready).unwrap_or(0))
    }

    /// In a guest with one CPU a reader wakes after each small write and answers as often: give way while the pipe fills.
    fn let_writer_on(&self, max_bytes: usize) {
        const ENOUGH_BYTES: usize = 256 << 10;
        const MAX_YIELDS: usize = 8;
        let mut before = 0;
        for _ in 0..MAX_YIELDS {
            match self.ready_bytes() {
                Ok(ready) if ready > before && ready < ENOUGH_BYTES.min(max_bytes) => before = ready,
                _ => return,
            }
            std::thread::yield_now();
        }
    }

    fn try_read(&self, max_bytes: usize) -> nix::Result<Vec<u8>> {
        const SMALL_BYTES: usize = 512;
        let ready = self.ready_bytes()?;
        let mut data = vec![0; ready.clamp(SMALL_BYTES, MAX_READ_BYTES).min(max_bytes)];
        loop {
            match nix::unistd::read(&self.fd, &mut data) {
                Ok(bytes) => {
                    data.truncate(bytes);
                    return Ok(data);
                }
                Err(Errno::EINTR) => {}
                // A terminal whose last process has gone.
                Err(Errno::EIO) => return Ok(Vec::new()),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Be watched by the pump of whoever is first, or by none when nobody waits.
    fn keep_watched(self: &Arc<Self>, state: &mut OutputState) {
        let first = state.queue.front().map(|front| Arc::clone(&front.caller.pump));
        match (&state.watched_by, first) {
            (None, Some(pump)) => {
                let source: Arc<dyn Source> = Arc::<Self>::clone(self);
                match pump.watch(
                    self.id,
                    self.fd.as_fd(),
                    source,
                    EpollFlags::EPOLLIN,
                    state.end_when_empty_from,
                ) {
                    Ok(()) => state.watched_by = Some(pump),
                    Err(error) => {
                        for read in state.queue.drain(..) {
                            read.caller.responder.error(Status::new(Code::Internal, error.to_string()));
                        }
                    }
                }
            }
            (Some(pump), None) => {
                pump.unwatch(self.id, self.fd.as_fd());
                state.watched_by = None;
            }
            _ => {}
        }
    }
}

impl Source for OutputStream {
    fn on_ready(self: Arc<Self>) {
        let mut state = self.lock();
        self.serve(&mut state);
        self.keep_watched(&mut state);
    }

    fn on_pump_ended(self: Arc<Self>, pump: &Pump) {
        let mut state = self.lock();
        state.queue.retain(|read| !std::ptr::eq(Arc::as_ptr(&read.caller.pump), pump));
        state.watched_by = None;
        self.keep_watched(&mut state);
    }
}

struct PendingWrite {
    caller: Caller,
    data: Vec<u8>,
    written: usize,
}

#[derive(Default)]
struct InputState {
    fd: Option<OwnedFd>,
    queue: VecDeque<PendingWrite>,
    closes_when_written: bool,
    watched_by: Option<Arc<Pump>>,
}

/// Standard input of a process.
pub struct InputStream {
    id: u64,
    is_terminal: bool,
    state: Mutex<InputState>,
}

impl std::fmt::Debug for InputStream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("InputStream").field("is_terminal", &self.is_terminal).finish_non_exhaustive()
    }
}

impl InputStream {
    /// Own the writing end.
    pub fn new(fd: OwnedFd, is_terminal: bool) -> Result<Arc<Self>> {
        set_nonblocking(&fd)?;
        let state = Mutex::new(InputState { fd: Some(fd), ..Default::default() });
        Ok(Arc::new(Self { id: next_source_id(), is_terminal, state }))
    }

    fn lock(&self) -> MutexGuard<'_, InputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answer when all of it is written. No data closes the stream when what came before is written.
    pub fn write(self: &Arc<Self>, caller: Caller, data: Vec<u8>) {
        let mut state = self.lock();
        if state.fd.is_none() || state.closes_when_written {
            let status = AgentError::system("write", "stdin", Errno::EPIPE).into();
            return caller.responder.error(status);
        }
        if data.is_empty() {
            state.closes_when_written = true;
        }
        state.queue.push_back(PendingWrite { caller, data, written: 0 });
        self.serve(&mut state);
        self.keep_watched(&mut state);
    }

    /// Close when what has been asked for is written. Again is no error.
    pub fn close(self: &Arc<Self>) {
        let mut state = self.lock();
        state.closes_when_written = true;
        self.serve(&mut state);
        self.keep_watched(&mut state);
    }

    fn serve(&self, state: &mut InputState) {
        while let (Some(fd), Some(front)) = (&state.fd, state.queue.front_mut()) {
            let result = write_some(fd, &front.data, &mut front.written);
            if result == Err(Errno::EAGAIN) {
                return;
            }
            let Some(front) = state.queue.pop_front() else { return };
            match result {
                Ok(()) => {
                    let len = u32::try_from(front.written).unwrap_or(u32::MAX);
                    front.caller.responder.ok(WriteStreamResponse { len }.encode_to_vec());
                }
                Err(errno) => {
                    front.caller.responder.error(AgentError::system("write", "stdin", errno).into())
                }
            }
        }
        if state.closes_when_written {
            self.close_now(state);
        }
    }

    fn close_now(&self, state: &mut InputState) {
        let Some(fd) = state.fd.take() else { return };
        if let Some(pump) = state.watched_by.take() {
            pump.unwatch(self.id, fd.as_fd());
        }
        if self.is_terminal {
            end_of_input(&fd);
        }
    }

    fn keep_watched(self: &Arc<Self>, state: &mut InputState) {
        let first = state.queue.front().map(|front| Arc::clone(&front.caller.pump));
        let Some(fd) = &state.fd else { return };
        match (&state.watched_by, first) {
            (None, Some(pump)) => {
                let source: Arc<dyn Source> = Arc::<Self>::clone(self);
                match pump.watch(self.id, fd.as_fd(), source, EpollFlags::EPOLLOUT, None) {
                    Ok(()) => state.watched_by = Some(pump),
                    Err(error) => {
                        for write in state.queue.drain(..) {
                            write.caller.responder.error(Status::new(Code::Internal, error.to_string()));
                        }
                    }
                }
            }
            (Some(pump), None) => {
                pump.unwatch(self.id, fd.as_fd());
                state.watched_by = None;
            }
            _ => {}
        }
    }
}

impl Source for InputStream {
    fn on_ready(self: Arc<Self>) {
        let mut state = self.lock();
        self.serve(&mut state);
        self.keep_watched(&mut state);
    }

    fn on_pump_ended(self: Arc<Self>, pump: &Pump) {
        let mut state = self.lock();
        state.queue.retain(|write| !std::ptr::eq(Arc::as_ptr(&write.caller.pump), pump));
        state.watched_by = None;
        self.serve(&mut state);
        self.keep_watched(&mut state);
    }
}

fn write_some(fd: &OwnedFd, data: &[u8], written: &mut usize) -> nix::Result<()> {
    while *written < data.len() {
        match nix::unistd::write(fd, &data[*written..]) {
            Ok(bytes) => *written += bytes,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// A terminal has no end of its own while its output is read: in line mode the end is a character.
fn end_of_input(terminal: &OwnedFd) {
    let Ok(settings) = tcgetattr(terminal) else { return };
    if settings.local_flags.contains(LocalFlags::ICANON) {
        let end = settings.control_chars[SpecialCharacterIndices::VEOF as usize];
        if let Err(errno) = nix::unistd::write(terminal, &[end]) {
            log::debug!("end of input not written to a terminal: {errno}");
        }
    }
}
