//! What well-behaved guests and hosts see.
#![allow(clippy::unwrap_used, missing_docs)]

mod guest;

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::time::Duration;

use casemate_vhost_vsock::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use casemate_vhost_vsock::{MAX_CONNECTIONS, WINDOW_BYTES};
use guest::{CID, EVENT_INDEX, Guest, INDIRECT, Peer, RING_SIZE, TX, is_closed, pattern, read_line};
use proptest::prelude::*;

#[test]
fn test_connect_when_the_guest_accepts_then_data_flows_both_ways() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    socket.write_all(b"to the guest").unwrap();
    assert_eq!(guest.receive_data(peer, 12), b"to the guest");
    guest.send_data(peer, b"to the host");
    let mut answer = [0; 11];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"to the host");
    let stats = guest.backend.stats();
    assert_eq!((stats.bytes_in_total, stats.bytes_out_total, stats.connections_open), (11, 12, 1));
}

#[test]
fn test_connect_when_more_follows_the_line_at_once_then_it_belongs_to_the_stream() {
    let mut guest = Guest::ready(0);
    let mut socket = std::os::unix::net::UnixStream::connect(guest.uds_path()).unwrap();
    socket.write_all(b"CONN").unwrap();
    socket.write_all(b"ECT 5\nearly").unwrap();
    let (request, _) = guest.receive();
    assert_eq!((request.src_cid, request.dst_cid, request.op), (HOST_CID, u64::from(CID), Op::Request));
    assert_eq!((request.buf_alloc, request.fwd_cnt), (WINDOW_BYTES, 0));
    let peer = Peer { guest_port: 5, host_port: request.src_port };
    guest.send_op(peer, Op::Response);
    assert_eq!(guest.receive_data(peer, 5), b"early");
    assert_eq!(read_line(&mut socket), format!("OK {}\n", peer.host_port));
}

#[test]
fn test_connect_when_the_line_is_wrong_then_closed() {
    let guest = Guest::ready(0);
    for line in ["CONNECT x\n", "GET / HTTP/1.1\r\n", "CONNECT 111111111111111111111111111111111"] {
        let mut socket = std::os::unix::net::UnixStream::connect(guest.uds_path()).unwrap();
        socket.set_read_timeout(Some(guest::DEADLINE)).unwrap();
        socket.write_all(line.as_bytes()).unwrap();
        assert!(is_closed(&mut socket), "{line:?}");
    }
    guest.wait_stats(|stats| stats.connections_open == 0);
}

#[test]
fn test_connect_when_the_host_gives_up_in_the_line_then_forgotten() {
    let guest = Guest::ready(0);
    let mut socket = std::os::unix::net::UnixStream::connect(guest.uds_path()).unwrap();
    socket.write_all(b"CONNECT 1").unwrap();
    guest.wait_stats(|stats| stats.connections_open == 1);
    drop(socket);
    guest.wait_stats(|stats| stats.connections_open == 0);
}

// Bug B of vhost-device-vsock: a CONNECT before the guest listens wedged the connection.
#[test]
fn test_connect_when_the_guest_refuses_then_closed_and_the_next_one_works() {
    let mut guest = Guest::ready(0);
    for _ in 0..3 {
        let mut socket = guest.dial(1024);
        let (request, _) = guest.receive();
        guest.send(&request.reset_reply(), &[]);
        assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    }
    guest.assert_works();
}

#[test]
fn test_connect_when_the_driver_does_not_run_then_closed_at_once_and_later_served() {
    let mut guest = Guest::new(0);
    assert_eq!(guest.dial(1024).read(&mut [0]).unwrap(), 0);
    guest.start_rings([0, 0]);
    guest.post_all_buffers();
    guest.assert_works();
}

#[test]
fn test_connect_when_the_guest_has_no_buffers_then_served_as_soon_as_it_has() {
    let mut guest = Guest::new(0);
    guest.start_rings([0, 0]);
    let mut socket = guest.dial(1024);
    guest.wait_stats(|stats| stats.connections_open == 1);
    assert_eq!(guest.try_receive(Duration::from_millis(20)), None);
    guest.post_all_buffers();
    let (request, _) = guest.receive();
    guest.send_op(Peer { guest_port: 1024, host_port: request.src_port }, Op::Response);
    assert!(read_line(&mut socket).starts_with("OK "));
}

#[test]
fn test_connect_when_the_host_gives_up_before_the_answer_then_the_guest_gets_a_reset() {
    let mut guest = Guest::ready(0);
    let socket = guest.dial(1024);
    let (request, _) = guest.receive();
    drop(socket);
    let peer = Peer { guest_port: 1024, host_port: request.src_port };
    guest.expect(Op::Reset, peer);
    // The answer that was under way meets nobody.
    guest.send_op(peer, Op::Response);
    guest.expect(Op::Reset, peer);
    guest.assert_works();
}

#[test]
fn test_guest_request_when_somebody_listens_then_connected_else_reset() {
    let mut guest = Guest::ready(0);
    let nobody = Peer { guest_port: 40_000, host_port: 5000 };
    guest.send_op(nobody, Op::Request);
    guest.expect(Op::Reset, nobody);
    let listener = guest.listen(5000);
    let (mut socket, peer) = guest.open_from_guest(&listener, 5000, 40_001);
    guest.send_data(peer, b"ready");
    let mut text = [0; 5];
    socket.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"ready");
}

// Bug A of the crate virtio-vsock: kernels from 6.2 on send larger packets in three and more descriptors.
#[test]
fn test_data_when_in_many_descriptors_then_arrives_whole() {
    for (features, indirect) in [(0, false), (INDIRECT, true), (EVENT_INDEX | INDIRECT, true)] {
        let mut guest = Guest::ready(features);
        let (mut socket, peer) = guest.open_from_host(1024);
        let data = pattern(64 << 10);
        let pages: Vec<usize> = [44].into_iter().chain(std::iter::repeat_n(4096, 16)).collect();
        for sizes in [&pages[..], &[44, 1, 2, 3], &[10, 10, 10, 14], &[43, 2], &[]] {
            guest.send_split(&peer.header(Op::Data, data.len()), &data, sizes, indirect);
            let mut arrived = vec![0; data.len()];
            socket.read_exact(&mut arrived).unwrap();
            assert!(arrived == data, "{sizes:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn test_data_when_split_anyhow_then_arrives_whole(
        packets in prop::collection::vec((1usize..20_000, prop::collection::vec(1usize..3000, 0..20), any::<bool>()), 1..8),
    ) {
        let mut guest = Guest::ready(INDIRECT);
        let (mut socket, peer) = guest.open_from_host(1024);
        for (bytes, sizes, indirect) in packets {
            let data = pattern(bytes);
            guest.send_split(&peer.header(Op::Data, bytes), &data, &sizes, indirect);
            let mut arrived = vec![0; bytes];
            socket.read_exact(&mut arrived).unwrap();
            prop_assert!(arrived == data);
        }
    }
}

#[test]
fn test_data_when_the_host_reads_slowly_then_the_guest_runs_out_of_credit_and_nothing_is_lost() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    let total = 4 << 20;
    let data = pattern(total);
    let (mut sent, mut forwarded, mut window) = (0usize, 0u32, WINDOW_BYTES);
    // Send as credit allows, without anybody reading.
    let fill = |guest: &mut Guest, sent: &mut usize, forwarded: u32, window: u32| {
        while *sent < total {
            let credit = window - (*sent as u32 - forwarded);
            let part = (credit as usize).min(total - *sent).min(32 << 10);
            if part == 0 {
                return;
            }
            guest.send_data(peer, &data[*sent..*sent + part]);
            *sent += part;
        }
    };
    loop {
        fill(&mut guest, &mut sent, forwarded, window);
        let Some((update, _)) = guest.try_receive(Duration::from_millis(30)) else { break };
        assert_eq!(update.op, Op::CreditUpdate);
        (forwarded, window) = (update.fwd_cnt, update.buf_alloc);
    }
    let socket_bytes = forwarded as usize;
    assert!(sent < total && sent <= socket_bytes + WINDOW_BYTES as usize, "{sent} bytes sent");
    // Others are served meanwhile.
    guest.assert_works();
    // Now somebody reads.
    let reader = std::thread::spawn(move || {
        let mut arrived = Vec::new();
        socket.read_to_end(&mut arrived).unwrap();
        arrived
    });
    while sent < total {
        let (update, _) = guest.receive();
        assert_eq!(update.op, Op::CreditUpdate);
        (forwarded, window) = (update.fwd_cnt, update.buf_alloc);
        fill(&mut guest, &mut sent, forwarded, window);
    }
    guest.send(&Header { flags: SHUTDOWN_BOTH, ..peer.header(Op::Shutdown, 0) }, &[]);
    assert!(reader.join().unwrap() == data);
}

#[test]
fn test_data_when_the_guest_reads_slowly_then_its_window_is_kept_and_credit_asked_for() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.send(&Header { buf_alloc: 10_000, ..peer.header(Op::CreditUpdate, 0) }, &[]);
    let data = pattern(100_000);
    socket.write_all(&data).unwrap();
    let mut arrived = guest.receive_data(peer, 10_000);
    assert_eq!(arrived.len(), 10_000);
    guest.expect(Op::CreditRequest, peer);
    assert_eq!(guest.try_receive(Duration::from_millis(20)), None);
    while arrived.len() < data.len() {
        let fwd_cnt = arrived.len() as u32;
        guest.send(&Header { buf_alloc: 10_000, fwd_cnt, ..peer.header(Op::CreditUpdate, 0) }, &[]);
        arrived.extend(guest.receive_data(peer, 10_000));
    }
    assert!(arrived == data);
}

#[test]
fn test_credit_request_when_the_guest_asks_then_answered() {
    let mut guest = Guest::ready(0);
    let (_socket, peer) = guest.open_from_host(1024);
    guest.send_data(peer, b"12345");
    guest.send_op(peer, Op::CreditRequest);
    assert_eq!(guest.expect(Op::CreditUpdate, peer).fwd_cnt, 5);
}

#[test]
fn test_half_close_when_the_host_ends_then_the_guest_may_go_on() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    socket.write_all(b"last words").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive_data(peer, 10), b"last words");
    assert_eq!(guest.expect(Op::Shutdown, peer).flags, SHUTDOWN_SEND);
    guest.send_data(peer, b"answer");
    guest.send(&Header { flags: SHUTDOWN_SEND, ..peer.header(Op::Shutdown, 0) }, &[]);
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"answer");
}

#[test]
fn test_half_close_when_the_guest_ends_then_the_host_may_go_on() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.send_data(peer, b"bye");
    guest.send(&Header { flags: SHUTDOWN_SEND, ..peer.header(Op::Shutdown, 0) }, &[]);
    let mut text = Vec::new();
    socket.read_to_end(&mut text).unwrap();
    assert_eq!(text, b"bye");
    socket.write_all(b"and you").unwrap();
    assert_eq!(guest.receive_data(peer, 7), b"and you");
    drop(socket);
    assert_eq!(guest.expect(Op::Shutdown, peer).flags, SHUTDOWN_BOTH);
    guest.send_op(peer, Op::Reset);
    guest.wait_stats(|stats| stats.connections_open == 0);
}

#[test]
fn test_half_close_when_the_guest_stops_receiving_then_the_host_can_not_write() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.send(&Header { flags: SHUTDOWN_RECEIVE, ..peer.header(Op::Shutdown, 0) }, &[]);
    guest.send_data(peer, b"still here");
    let mut text = [0; 10];
    socket.read_exact(&mut text).unwrap();
    assert_eq!(socket.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn test_close_when_the_host_closes_then_all_its_data_and_a_shutdown_reach_the_guest() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    let data = pattern(150_000);
    socket.write_all(&data).unwrap();
    drop(socket);
    assert!(guest.receive_data(peer, data.len()) == data);
    assert_eq!(guest.expect(Op::Shutdown, peer).flags, SHUTDOWN_BOTH);
    guest.send_op(peer, Op::Reset);
    guest.wait_stats(|stats| stats.connections_open == 0);
}

#[test]
fn test_close_when_the_guest_closes_with_a_backlog_then_the_host_still_gets_it() {
    for op in [Op::Shutdown, Op::Reset] {
        let mut guest = Guest::ready(0);
        let (mut socket, peer) = guest.open_from_host(1024);
        let data = pattern(WINDOW_BYTES as usize);
        // More than the socket takes at once, so that a part waits in the backend.
        for part in data.chunks(32 << 10) {
            guest.send_data(peer, part);
        }
        guest.expect(Op::CreditUpdate, peer);
        guest.send(&Header { flags: SHUTDOWN_BOTH, ..peer.header(op, 0) }, &[]);
        let mut arrived = Vec::new();
        socket.read_to_end(&mut arrived).unwrap();
        assert!(arrived == data, "{op:?}");
        if op == Op::Shutdown {
            guest.expect(Op::Reset, peer);
        }
        guest.wait_stats(|stats| stats.connections_open == 0);
    }
}

#[test]
fn test_close_when_the_host_closes_without_reading_then_the_guest_is_told() {
    let mut guest = Guest::ready(0);
    let (socket, peer) = guest.open_from_host(1024);
    guest.send_data(peer, b"never read");
    guest.wait_stats(|stats| stats.bytes_in_total == 10);
    drop(socket);
    assert_eq!(guest.expect(Op::Shutdown, peer).flags, SHUTDOWN_BOTH);
    // What was under way is taken and forgotten.
    guest.send_data(peer, b"late");
    guest.send_op(peer, Op::Reset);
    guest.wait_stats(|stats| stats.connections_open == 0);
}

#[test]
fn test_connections_when_fifty_at_once_then_each_gets_its_own_bytes() {
    let mut guest = Guest::ready(EVENT_INDEX);
    let mut open: Vec<_> = (0..50).map(|index| guest.open_from_host(1000 + index)).collect();
    for (index, (socket, _)) in open.iter_mut().enumerate() {
        socket.write_all(&pattern(10_000 + index)).unwrap();
    }
    let mut arrived = vec![Vec::new(); open.len()];
    while arrived.iter().enumerate().any(|(index, data)| data.len() < 10_000 + index) {
        let (header, data) = guest.receive();
        assert_eq!(header.op, Op::Data);
        arrived[(header.dst_port - 1000) as usize].extend(data);
    }
    for (index, data) in arrived.iter().enumerate() {
        assert!(*data == pattern(10_000 + index), "{index}");
    }
    assert_eq!(guest.backend.stats().connections_open, 50);
}

#[test]
fn test_connections_when_one_is_in_bulk_then_another_is_not_kept_waiting() {
    let mut guest = Guest::ready(0);
    let (mut bulk, bulk_peer) = guest.open_from_host(1);
    let (mut small, small_peer) = guest.open_from_host(2);
    let writer = std::thread::spawn(move || {
        bulk.write_all(&pattern(900_000)).unwrap();
        bulk
    });
    assert_eq!(guest.receive().0.dst_port, bulk_peer.guest_port);
    small.write_all(b"hello").unwrap();
    let mut before = 0;
    while guest.receive().0.dst_port != small_peer.guest_port {
        before += 1;
    }
    // Whatever was filled already, the rest of a turn of 8 batches, and one batch: 17 packets each.
    assert!(before <= usize::from(RING_SIZE) + 9 * 17, "{before} packets came first");
    // The writer ends when the guest has taken all or the backend closes.
    guest.backend.close().unwrap();
    drop(writer);
}

#[test]
fn test_connections_when_above_the_limit_then_refused_and_below_it_served_again() {
    let mut guest = Guest::ready(0);
    let idle: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| std::os::unix::net::UnixStream::connect(guest.uds_path()).unwrap())
        .collect();
    guest.wait_stats(|stats| stats.connections_open == MAX_CONNECTIONS as u64);
    assert!(is_closed(&mut guest.dial(1)));
    let listener = guest.listen(5000);
    let peer = Peer { guest_port: 1, host_port: 5000 };
    guest.send_op(peer, Op::Request);
    guest.expect(Op::Reset, peer);
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    drop(idle);
    guest.wait_stats(|stats| stats.connections_open == 0);
    guest.assert_works();
}

#[test]
fn test_buffers_when_small_or_odd_then_data_is_cut_to_fit() {
    let mut guest = Guest::new(0);
    guest.start_rings([0, 0]);
    guest.repost = false;
    for index in 0..RING_SIZE {
        guest.post_buffer(index, 45 + u32::from(index % 7) * 100);
    }
    guest.kick(guest::RX);
    let (mut socket, peer) = guest.open_from_host(1024);
    let data = pattern(20_000);
    socket.write_all(&data).unwrap();
    assert!(guest.receive_data(peer, data.len()) == data);
}

#[test]
fn test_event_index_when_negotiated_then_the_guest_is_called_only_when_it_asks() {
    let mut guest = Guest::ready(EVENT_INDEX);
    let (mut socket, peer) = guest.open_from_host(1024);
    // Not asked for: the index that the guest waits for has passed.
    let _ = guest.rings[guest::RX].call.read();
    let before = guest.used_index(guest::RX);
    socket.write_all(b"quiet").unwrap();
    guest::wait_until(|| guest.used_index(guest::RX) != before);
    assert!(guest.rings[guest::RX].call.read().is_err());
    assert_eq!(guest.receive_data(peer, 5), b"quiet");
    // Asked for.
    guest.ask_for_call(guest::RX);
    socket.write_all(b"loud").unwrap();
    assert_eq!(guest.receive_data(peer, 4), b"loud");
}

#[test]
fn test_kick_when_many_packets_wait_then_all_are_taken() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    // 60 packets of two descriptors each behind one kick.
    for index in 0..60u16 {
        let at = guest::TX_BUFFERS + u64::from(index) * 1024;
        let data = [index as u8; 100];
        guest.write(at, &peer.header(Op::Data, 100).encode());
        guest.write(at + 44, &data);
        let table = guest.rings[TX].descriptors;
        let first = guest::Descriptor { address: at, bytes: 44, flags: guest::NEXT, next: index * 2 + 1 };
        let second = guest::Descriptor { address: at + 44, bytes: 100, flags: 0, next: 0 };
        guest.write_descriptor(table, index * 2, first);
        guest.write_descriptor(table, index * 2 + 1, second);
        guest.publish(TX, index * 2);
    }
    guest.kick(TX);
    let mut arrived = vec![0; 6000];
    socket.read_exact(&mut arrived).unwrap();
    assert!(arrived.chunks(100).enumerate().all(|(index, part)| part == [index as u8; 100]));
}
