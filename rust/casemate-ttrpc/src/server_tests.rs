#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::frame::encode_frame;

/// Answers by method: echo, status, drop, too_large; `park` hands the responder to the test.
struct Script {
    parked: Mutex<mpsc::Sender<(ServerRequest, Responder)>>,
    closed: Mutex<mpsc::Sender<bool>>,
}

impl Handler for Script {
    fn handle(&self, request: ServerRequest, responder: Responder) {
        match request.method.as_str() {
            "echo" => responder.ok(request.payload),
            "status" => responder.error(Status::unknown_method("status")),
            "drop" => drop(responder),
            "too_large" => responder.ok(vec![0; MAX_DATA_BYTES]),
            _ => self.parked.lock().unwrap().send((request, responder)).unwrap(),
        }
    }

    fn connection_closed(&self, connection: &ConnectionHandle) {
        self.closed.lock().unwrap().send(connection.is_closed()).unwrap();
    }
}

struct Peer {
    socket: UnixStream,
    decoder: FrameDecoder,
    parked: mpsc::Receiver<(ServerRequest, Responder)>,
    closed: mpsc::Receiver<bool>,
    server: Option<thread::JoinHandle<Result<(), TtrpcError>>>,
}

impl Peer {
    fn new() -> Self {
        let (socket, served) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (parked_tx, parked) = mpsc::channel();
        let (closed_tx, closed) = mpsc::channel();
        let handler: Arc<dyn Handler> =
            Arc::new(Script { parked: Mutex::new(parked_tx), closed: Mutex::new(closed_tx) });
        let server = Some(thread::spawn(move || serve_connection(served.into(), &handler)));
        Self { socket, decoder: FrameDecoder::new(), parked, closed, server }
    }

    fn send(&mut self, stream: u32, flags: u8, request: &Request) {
        self.send_frame(stream, FrameKind::Request, flags, &request.encode_to_vec());
    }

    fn send_frame(&mut self, stream: u32, kind: FrameKind, flags: u8, data: &[u8]) {
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, StreamId(stream), kind, flags, data).unwrap();
        self.socket.write_all(&bytes).unwrap();
    }

    fn call(&mut self, stream: u32, method: &str, payload: &[u8]) {
        self.send(stream, 0, &request(method, payload));
    }

    fn answer(&mut self) -> (u32, Response) {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                assert_eq!((frame.header.kind, frame.header.flags), (FrameKind::Response, 0));
                return (frame.header.stream.0, Response::decode(frame.data).unwrap());
            }
            let bytes = self.socket.read(self.decoder.space()).unwrap();
            assert_ne!(bytes, 0, "the server closed the connection");
            self.decoder.filled(bytes);
        }
    }

    fn status(&mut self) -> (u32, i32, String) {
        let (stream, response) = self.answer();
        let status = response.status.unwrap();
        (stream, status.code, status.message)
    }

    fn end(mut self) -> Result<(), TtrpcError> {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        let result = self.server.take().unwrap().join().unwrap();
        assert!(self.closed.recv_timeout(Duration::from_secs(10)).unwrap());
        result
    }
}

fn request(method: &str, payload: &[u8]) -> Request {
    Request { service: "s".into(), method: method.into(), payload: payload.to_vec(), ..Request::default() }
}

#[test]
fn serve_when_called_then_answers_on_the_same_stream_until_the_peer_closes() {
    let mut peer = Peer::new();
    for (stream, payload) in [(1, &b""[..]), (3, b"abc"), (5, &[7; 70_000])] {
        peer.call(stream, "echo", payload);
        assert_eq!(peer.answer(), (stream, Response { status: None, payload: payload.to_vec() }));
    }
    assert_eq!(peer.end(), Ok(()));
}

#[test]
fn serve_when_answers_come_in_another_order_then_each_goes_to_its_stream() {
    let mut peer = Peer::new();
    for stream in [1, 3, 5] {
        peer.call(stream, "park", &[]);
    }
    let mut parked: Vec<_> = (0..3).map(|_| peer.parked.recv().unwrap()).collect();
    parked.reverse();
    for (request, responder) in parked {
        responder.ok(vec![u8::try_from(request.stream.0).unwrap()]);
    }
    let answers: Vec<_> = (0..3).map(|_| peer.answer()).map(|(id, answer)| (id, answer.payload)).collect();
    assert_eq!(answers, [(5, vec![5]), (3, vec![3]), (1, vec![1])]);
}

#[test]
fn serve_when_stream_is_even_then_invalid_argument_with_the_known_text() {
    let mut peer = Peer::new();
    peer.call(2, "echo", &[]);
    assert_eq!(peer.status(), (2, Code::InvalidArgument as i32, "stream id must be odd".into()));
}

#[test]
fn serve_when_request_cannot_be_decoded_then_invalid_argument_and_the_connection_stays() {
    let mut peer = Peer::new();
    peer.send_frame(1, FrameKind::Request, 0, b"\x0a\xff");
    assert_eq!(peer.status().1, Code::InvalidArgument as i32);
    peer.call(3, "echo", b"on");
    assert_eq!(peer.answer().1.payload, b"on");
}

#[test]
fn serve_when_body_is_too_large_then_that_stream_fails_and_the_connection_stays() {
    let mut peer = Peer::new();
    let data_bytes = u32::try_from(MAX_DATA_BYTES + 1).unwrap();
    let header = FrameHeader { data_bytes, stream: StreamId(1), kind: FrameKind::Request, flags: 0 };
    peer.socket.write_all(&header.encode()).unwrap();
    peer.socket.write_all(&vec![0; MAX_DATA_BYTES + 1]).unwrap();
    peer.call(3, "echo", b"on");
    let (stream, code, _) = peer.status();
    assert_eq!((stream, code), (1, Code::ResourceExhausted as i32));
    assert_eq!(peer.answer().1.payload, b"on");
}

#[test]
fn serve_when_kind_is_unknown_or_a_response_then_ignored() {
    let mut peer = Peer::new();
    for kind in [FrameKind::Unknown(77), FrameKind::Response, FrameKind::Data] {
        peer.send_frame(1, kind, 0, b"x");
    }
    peer.call(3, "echo", b"on");
    assert_eq!(peer.answer().0, 3);
}

#[test]
fn serve_when_streaming_flags_come_then_a_stream_is_unimplemented_and_the_others_are_served() {
    let mut peer = Peer::new();
    peer.send(1, FLAG_REMOTE_OPEN, &request("echo", b""));
    let (stream, code, _) = peer.status();
    assert_eq!((stream, code), (1, Code::Unimplemented as i32));
    for (stream, flag) in [(3, crate::frame::FLAG_REMOTE_CLOSED), (5, crate::frame::FLAG_NO_DATA)] {
        peer.send(stream, flag, &request("echo", b"x"));
        assert_eq!(peer.answer().0, stream);
    }
}

#[test]
fn serve_when_the_callers_time_runs_out_then_deadline_exceeded_and_a_late_answer_is_dropped() {
    let mut peer = Peer::new();
    peer.send(1, 0, &Request { timeout_nano: 20_000_000, ..request("park", b"") });
    assert_eq!(peer.status(), (1, Code::DeadlineExceeded as i32, "timeout".into()));
    let (request, responder) = peer.parked.recv().unwrap();
    assert_eq!(request.timeout, Some(Duration::from_millis(20)));
    assert!(!responder.is_wanted());
    responder.ok(vec![1]);
    peer.call(3, "echo", b"on");
    assert_eq!(peer.answer().0, 3);
}

#[test]
fn serve_when_a_deadline_is_pending_then_other_calls_are_served() {
    let mut peer = Peer::new();
    peer.send(1, 0, &Request { timeout_nano: 60_000_000_000, ..request("park", b"") });
    let (_, responder) = peer.parked.recv().unwrap();
    peer.call(3, "echo", b"on");
    assert_eq!(peer.answer().0, 3);
    responder.ok(vec![]);
    assert_eq!(peer.answer().0, 1);
}

#[test]
fn serve_when_the_handler_fails_or_forgets_then_its_status_or_internal() {
    let mut peer = Peer::new();
    peer.call(1, "status", &[]);
    assert_eq!(peer.status(), (1, Code::Unimplemented as i32, "status method".into()));
    peer.call(3, "drop", &[]);
    assert_eq!(peer.status().1, Code::Internal as i32);
    peer.call(5, "too_large", &[]);
    assert_eq!(peer.status().1, Code::ResourceExhausted as i32);
}

#[test]
fn serve_when_a_stream_id_is_used_twice_at_once_then_the_second_is_refused() {
    let mut peer = Peer::new();
    peer.call(1, "park", &[]);
    peer.call(1, "park", &[]);
    assert_eq!(peer.status().1, Code::InvalidArgument as i32);
}

#[test]
fn serve_when_too_many_calls_are_open_then_resource_exhausted() {
    let mut peer = Peer::new();
    let mut held = Vec::new();
    for call in 0..=u32::try_from(MAX_OPEN_CALLS).unwrap() {
        peer.call(2 * call + 1, "park", &[]);
        if (call as usize) < MAX_OPEN_CALLS {
            held.push(peer.parked.recv().unwrap());
        }
    }
    assert_eq!(peer.status().1, Code::ResourceExhausted as i32);
    // The peer first: it would not read the answers to what is held.
    drop(peer);
}

#[test]
fn serve_when_metadata_comes_then_the_handler_sees_it() {
    let mut peer = Peer::new();
    let metadata = vec![crate::message::KeyValue { key: "traceparent".into(), value: "00-1".into() }];
    peer.send(1, 0, &Request { metadata, ..request("park", b"") });
    let (request, _responder) = peer.parked.recv().unwrap();
    assert_eq!(request.metadata, [("traceparent".to_string(), "00-1".to_string())]);
}

#[test]
fn serve_when_the_peer_goes_then_handlers_see_it_and_an_answer_is_harmless() {
    let mut peer = Peer::new();
    peer.call(1, "park", &[]);
    let (request, responder) = peer.parked.recv().unwrap();
    assert!(!request.connection.is_closed());
    assert_eq!(peer.end(), Ok(()));
    assert!(request.connection.is_closed() && !responder.is_wanted());
    let mut fds = [PollFd::new(request.connection.closed_event(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 0u8).unwrap(), 1);
    responder.ok(vec![1]);
}

#[test]
fn serve_when_the_peer_reads_nothing_then_shut_down_releases_the_blocked_answer() {
    let mut peer = Peer::new();
    peer.call(1, "park", &[]);
    let (request, responder) = peer.parked.recv().unwrap();
    let answering = thread::spawn(move || responder.ok(vec![0; MAX_DATA_BYTES - 16]));
    // The first bytes are there, the rest can't be: the answer is larger than any socket buffer.
    peer.socket.read_exact(&mut [0; 10]).unwrap();
    request.connection.shut_down();
    answering.join().unwrap();
    assert_eq!(peer.server.take().unwrap().join().unwrap(), Ok(()));
}
