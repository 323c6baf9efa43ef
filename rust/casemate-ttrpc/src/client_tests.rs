#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};

use prost::Message;

use super::*;
use crate::frame::FrameDecoder;
use crate::frame::MAX_DATA_BYTES;
use crate::message::Request;
use crate::message::{Code, Status};
use crate::server::{Handler, Responder, ServerRequest, serve_connection};

/// `echo` answers at once, `later` on a thread of its own, `never` keeps the responder.
#[derive(Default)]
struct Echo {
    kept: Mutex<Vec<Responder>>,
}

impl Handler for Echo {
    fn handle(&self, request: ServerRequest, responder: Responder) {
        match request.method.as_str() {
            "echo" => responder.ok(request.payload),
            "later" => drop(thread::spawn(move || responder.ok(request.payload))),
            "never" => self.kept.lock().unwrap().push(responder),
            method => responder.error(Status::unknown_method(method)),
        }
    }
}

fn served() -> Arc<Client> {
    let (socket, server) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let handler: Arc<dyn Handler> = Arc::new(Echo::default());
        serve_connection(server.into(), &handler)
    });
    Arc::new(Client::new(socket.into(), None).unwrap())
}

fn submit(client: &Client, method: &str, payload: &[u8]) -> StreamId {
    client.submit(&Call { service: "s", method, payload, ..Call::default() }).unwrap()
}

/// Runs `work` on a thread and fails the test instead of hanging when it does not end.
fn within<T: Send + 'static>(limit_s: u64, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || tx.send(work()));
    rx.recv_timeout(Duration::from_secs(limit_s)).unwrap()
}

#[test]
fn wait_when_answered_then_has_the_payload_or_the_status() {
    let client = served();
    let (echo, unknown) = (submit(&client, "echo", b"abc"), submit(&client, "nope", b""));
    assert_eq!(client.wait(unknown), Err(TtrpcError::Rpc(Status::new(Code::Unimplemented, "nope method"))));
    assert_eq!(client.wait(echo), Ok(b"abc".to_vec()));
    assert_eq!(client.wait(echo), Err(TtrpcError::UnknownSlot { slot: echo }));
}

#[test]
fn wait_when_many_threads_contend_then_each_gets_its_own_answer() {
    let client = served();
    let threads: Vec<_> = (0..16_usize)
        .map(|number| {
            let client = Arc::clone(&client);
            thread::spawn(move || {
                for round in 0..150_usize {
                    let payload = vec![u8::try_from(number).unwrap(); (number * 997 + round * 331) % 40_000];
                    let method = if round % 3 == 0 { "later" } else { "echo" };
                    let slot = submit(&client, method, &payload);
                    assert!(client.wait(slot).unwrap() == payload, "thread {number} round {round}");
                }
            })
        })
        .collect();
    within(60, move || threads.into_iter().for_each(|thread| thread.join().unwrap()));
    assert_eq!(client.lock().state.slot_count(), 0);
    assert!(client.lock().followers.is_empty());
}

#[test]
fn wait_when_the_leader_has_its_answer_then_a_follower_leads_on() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let client = Arc::new(Client::new(socket.into(), None).unwrap());
    let slots: Vec<StreamId> = (0..3).map(|_| submit(&client, "m", b"")).collect();
    let waiting: Vec<_> = slots
        .iter()
        .map(|slot| {
            let (client, slot) = (Arc::clone(&client), *slot);
            thread::spawn(move || client.wait(slot))
        })
        .collect();
    for (slot, thread) in slots.iter().zip(waiting) {
        let mut frame = vec![0, 0, 0, 3, 0, 0, 0, 0, 2, 0, 0x12, 1];
        frame[7] = u8::try_from(slot.0).unwrap();
        frame.push(b'0' + frame[7]);
        peer.write_all(&frame).unwrap();
        let answer = within(10, move || thread.join().unwrap());
        assert_eq!(answer, Ok(vec![*frame.last().unwrap()]));
    }
}

#[test]
fn wait_when_the_deadline_passes_then_deadline_exceeded_even_behind_a_leader_without_one() {
    let client = served();
    let endless = submit(&client, "never", b"");
    let leader = {
        let client = Arc::clone(&client);
        thread::spawn(move || client.wait(endless))
    };
    let timeout = Some(Duration::from_millis(30));
    let slot = client.submit(&Call { method: "never", timeout, ..Call::default() }).unwrap();
    let waiting = Arc::clone(&client);
    let answer = within(10, move || waiting.wait(slot));
    assert!(matches!(answer, Err(TtrpcError::DeadlineExceeded { .. })), "{answer:?}");
    client.close();
    assert!(matches!(within(10, move || leader.join().unwrap()), Err(TtrpcError::Closed { .. })));
}

#[test]
fn wait_ready_when_nothing_comes_then_timed_out_and_the_slot_stays_open() {
    let client = served();
    let (never, echo) = (submit(&client, "never", b""), submit(&client, "never", b""));
    let until = Instant::now() + Duration::from_millis(20);
    assert_eq!(client.wait_ready(&[never, echo], Some(until)), Waited::TimedOut);
    assert!(Instant::now() >= until);
    assert_eq!(client.take(never), None);
    assert_eq!(client.wait_ready(&[], None), Waited::Ready(vec![]));
}

#[test]
fn wait_ready_when_the_time_is_over_already_then_what_has_come_is_taken_in() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let client = Client::new(socket.into(), None).unwrap();
    let slot = submit(&client, "m", b"");
    peer.write_all(&[0, 0, 0, 3, 0, 0, 0, 1, 2, 0, 0x12, 1, b'1']).unwrap();
    assert_eq!(client.wait_ready(&[slot], Some(Instant::now())), Waited::Ready(vec![slot]));
}

#[test]
fn cancel_when_another_thread_waits_then_it_is_told_and_the_late_answer_is_counted() {
    let client = served();
    let slot = submit(&client, "never", b"");
    let waiting = {
        let client = Arc::clone(&client);
        thread::spawn(move || client.wait(slot))
    };
    client.cancel(slot);
    assert_eq!(within(10, move || waiting.join().unwrap()), Err(TtrpcError::UnknownSlot { slot }));
    let (late, on) = (submit(&client, "echo", b""), submit(&client, "echo", b"on"));
    client.cancel(late);
    assert_eq!(client.wait(on), Ok(b"on".to_vec()));
    assert_eq!(client.dropped_answers_total(), 1);
}

#[test]
fn wait_when_the_connection_breaks_then_every_waiter_ends() {
    let (socket, peer) = UnixStream::pair().unwrap();
    let client = Arc::new(Client::new(socket.into(), None).unwrap());
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let client = Arc::clone(&client);
            thread::spawn(move || client.wait(submit(&client, "m", b"")))
        })
        .collect();
    while client.lock().state.slot_count() < 8 {
        thread::yield_now();
    }
    drop(peer);
    for thread in waiting {
        let answer = within(10, move || thread.join().unwrap());
        assert_eq!(answer, Err(TtrpcError::Closed { reason: "the peer closed it".into() }));
    }
    assert!(client.broken().is_some());
}

#[test]
fn wait_when_the_watched_process_ends_then_closed_but_answers_before_it_count() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let (watch, process) = UnixStream::pair().unwrap();
    let client = Arc::new(Client::new(socket.into(), Some(watch.into())).unwrap());
    let (first, second) = (submit(&client, "m", b""), submit(&client, "m", b""));
    peer.write_all(&[0, 0, 0, 3, 0, 0, 0, 1, 2, 0, 0x12, 1, b'1']).unwrap();
    drop(process);
    let waiting = Arc::clone(&client);
    let answer = within(10, move || waiting.wait(second));
    assert!(matches!(answer, Err(TtrpcError::Closed { .. })), "{answer:?}");
    assert_eq!(client.wait(first), Ok(b"1".to_vec()));
}

#[test]
fn submit_when_the_socket_is_full_then_the_rest_is_sent_while_waiting() {
    let client = served();
    let payload = vec![5; MAX_DATA_BYTES - 100];
    let slots: Vec<StreamId> = (0..4).map(|_| submit(&client, "echo", &payload)).collect();
    assert!(client.wants_write());
    let waiting = Arc::clone(&client);
    let sizes =
        within(30, move || slots.iter().map(|slot| waiting.wait(*slot).unwrap().len()).collect::<Vec<_>>());
    assert_eq!(sizes, [payload.len(); 4]);
    assert!(!client.wants_write());
}

#[test]
fn submit_when_a_leader_sleeps_and_the_socket_is_full_then_the_leader_sends_the_rest() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let client = Arc::new(Client::new(socket.into(), None).unwrap());
    let waiting = {
        let client = Arc::clone(&client);
        thread::spawn(move || client.wait(submit(&client, "m", b"")))
    };
    while client.lock().leader.is_none() {
        thread::yield_now();
    }
    submit(&client, "m", &vec![0; 1 << 20]);
    assert!(client.wants_write());
    let (mut read, mut buffer) = (0, vec![0; 1 << 16]);
    peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    while read < 1 << 20 {
        read += peer.read(&mut buffer).unwrap();
    }
    client.close();
    assert!(within(10, move || waiting.join().unwrap()).is_err());
}

#[test]
fn submit_when_bytes_are_kept_already_then_each_request_goes_out_once_and_whole() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let client = Client::new(socket.into(), None).unwrap();
    let payloads = [vec![1; 1 << 20], vec![2; 64], Vec::new(), vec![3; 2000], vec![4; 1024]];
    let slots: Vec<StreamId> = payloads.iter().map(|payload| submit(&client, "m", payload)).collect();
    peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (mut decoder, mut seen, mut buffer) = (FrameDecoder::new(), Vec::new(), vec![0; 1 << 16]);
    while seen.len() < payloads.len() {
        client.on_writable();
        let bytes = peer.read(&mut buffer).unwrap();
        decoder.extend(&buffer[..bytes]);
        while let Some(frame) = decoder.next_frame().unwrap() {
            seen.push((frame.header.stream, Request::decode(frame.data).unwrap().payload));
        }
    }
    assert_eq!(seen, slots.into_iter().zip(payloads).collect::<Vec<_>>());
    assert_eq!((decoder.pending_bytes(), client.wants_write()), (0, false));
}

#[test]
fn on_readable_when_answers_came_then_returns_all_finished_slots_once() {
    let client = served();
    let (echo, never) = (submit(&client, "echo", b"x"), submit(&client, "never", b""));
    let descriptors = client.lock().descriptors.clone().unwrap();
    let mut fds = [PollFd::new(descriptors.socket.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 10_000u16), Ok(1));
    assert_eq!(client.on_readable(), [(echo, Ok(b"x".to_vec()))]);
    assert_eq!(client.on_readable(), []);
    let gone = TtrpcError::Closed { reason: "gone".into() };
    assert_eq!(client.fail(&gone), [never]);
    assert_eq!(client.on_readable(), [(never, Err(gone))]);
}

#[test]
fn close_when_called_twice_then_socket_is_given_back_and_calls_are_refused() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let client = Client::new(socket.into(), None).unwrap();
    client.close();
    client.close();
    assert!(client.socket().is_none());
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
    assert!(matches!(client.submit(&Call::default()), Err(TtrpcError::Closed { .. })));
}
