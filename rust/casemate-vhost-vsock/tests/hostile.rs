//! What a guest that means harm, or is broken, can do: end its own connections and nothing else.
#![allow(clippy::unwrap_used, missing_docs)]

mod guest;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use casemate_vhost_vsock::packet::{HEADER_BYTES, Header, Op};
use casemate_vhost_vsock::{MAX_RESETS, WINDOW_BYTES};
use guest::{
    BASE, Descriptor, EVENT_INDEX, Guest, INDIRECT, INDIRECT_TABLE, MEMORY_BYTES, NEXT, Peer, RING_SIZE, RX,
    RX_BUFFER_BYTES, RX_BUFFERS, TABLES, TX, TX_BUFFERS, WRITE, is_closed,
};
use proptest::prelude::*;

/// Another connection that must not notice anything.
fn bystander(guest: &mut Guest) -> (UnixStream, Peer) {
    guest.open_from_host(77)
}

fn assert_unharmed(guest: &mut Guest, (socket, peer): &mut (UnixStream, Peer)) {
    guest.send_data(*peer, b"still");
    let mut text = [0; 5];
    socket.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"still");
    socket.write_all(b"here").unwrap();
    assert_eq!(guest.receive_data(*peer, 4), b"here");
    assert_eq!(guest.backend.error(), None);
}

/// Write a header into the TX area and make the chain that begins at descriptor 0 available; wait until it is back.
fn send_chain(guest: &mut Guest, header: &Header, descriptors: &[Descriptor]) {
    guest.write(TX_BUFFERS, &header.encode());
    for (index, descriptor) in descriptors.iter().enumerate() {
        guest.write_descriptor(guest.rings[TX].descriptors, index as u16, *descriptor);
    }
    guest.publish(TX, 0);
    guest.kick(TX);
    assert_eq!(guest.wait_used(TX).0, 0);
}

#[test]
fn test_data_when_beyond_the_window_then_that_connection_alone_is_reset() {
    let mut guest = Guest::ready(0);
    let mut other = bystander(&mut guest);
    let (mut socket, peer) = guest.open_from_host(1024);
    let data = guest::pattern(64 << 10);
    // The socket takes some; nothing is read, so in the end the window is full, and credit is not minded.
    let reset = (0..64).find_map(|_| {
        guest.send_data(peer, &data);
        let (header, _) = guest.try_receive(Duration::from_millis(1))?;
        (header.op == Op::Reset).then_some(header)
    });
    assert_eq!(reset.unwrap().dst_port, 1024);
    let mut arrived = Vec::new();
    let _ = socket.read_to_end(&mut arrived);
    assert!(arrived.len() < WINDOW_BYTES as usize * 3);
    assert_unharmed(&mut guest, &mut other);
}

#[test]
fn test_data_when_longer_than_the_chain_then_reset() {
    let mut guest = Guest::ready(0);
    let mut other = bystander(&mut guest);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.send(&peer.header(Op::Data, 1000), &[0; 999]);
    guest.expect(Op::Reset, peer);
    assert!(is_closed(&mut socket));
    assert_unharmed(&mut guest, &mut other);
}

#[test]
fn test_data_when_shorter_than_the_chain_then_only_what_the_header_says_arrives() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.send(&peer.header(Op::Data, 3), b"abcdef");
    guest.send(&peer.header(Op::Data, 3), b"ghi");
    let mut text = [0; 6];
    socket.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"abcghi");
}

#[test]
fn test_packet_when_out_of_turn_then_that_connection_alone_is_reset() {
    for op in [Op::Request, Op::Response, Op::Unknown(0), Op::Unknown(8), Op::Unknown(u16::MAX)] {
        let mut guest = Guest::ready(0);
        let mut other = bystander(&mut guest);
        let (mut socket, peer) = guest.open_from_host(1024);
        guest.send_op(peer, op);
        guest.expect(Op::Reset, peer);
        assert!(is_closed(&mut socket), "{op:?}");
        assert_unharmed(&mut guest, &mut other);
    }
}

#[test]
fn test_packet_when_of_another_sender_then_dropped_silently() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.send(&Header { src_cid: 4, ..peer.header(Op::Reset, 0) }, &[]);
    assert_eq!(guest.backend.stats().packets_dropped_total, 1);
    guest.send_data(peer, b"x");
    socket.read_exact(&mut [0]).unwrap();
    assert_eq!(guest.try_receive(Duration::from_millis(20)), None);
}

#[test]
fn test_packet_when_not_for_the_host_or_not_a_stream_then_reset_as_addressed() {
    let mut guest = Guest::ready(0);
    let peer = Peer { guest_port: 1, host_port: 2 };
    let requests = [
        Header { dst_cid: 3, ..peer.header(Op::Request, 0) },
        Header { dst_cid: u64::MAX, ..peer.header(Op::Request, 0) },
        Header { socket_type: 2, ..peer.header(Op::Request, 0) },
        Header { socket_type: 0, ..peer.header(Op::Data, 0) },
    ];
    for request in requests {
        guest.send(&request, &[]);
        let (reply, _) = guest.receive();
        assert_eq!(
            (reply.op, reply.src_cid, reply.socket_type),
            (Op::Reset, request.dst_cid, request.socket_type)
        );
        assert_eq!((reply.src_port, reply.dst_port), (2, 1));
        // A reset is never answered, or two sides could go on for ever.
        guest.send(&Header { op: Op::Reset, ..request }, &[]);
    }
    assert_eq!(guest.try_receive(Duration::from_millis(20)), None);
}

#[test]
fn test_chain_when_malformed_then_returned_and_dropped() {
    let header = |bytes, flags, next| Descriptor { address: TX_BUFFERS, bytes, flags, next };
    let end = BASE + MEMORY_BYTES as u64;
    let whole = HEADER_BYTES as u32;
    let chains: [&[Descriptor]; 12] = [
        // Too short for a header.
        &[header(43, 0, 0)],
        &[header(0, 0, 0)],
        // In a circle.
        &[header(whole, NEXT, 0)],
        &[header(whole, NEXT, 1), header(1, NEXT, 0)],
        // Out of the table.
        &[header(whole, NEXT, RING_SIZE)],
        &[header(whole, NEXT, u16::MAX)],
        // Out of memory.
        &[Descriptor { address: 0, bytes: 44, flags: 0, next: 0 }],
        &[Descriptor { address: end - 10, bytes: 44, flags: 0, next: 0 }],
        &[header(whole, NEXT, 1), Descriptor { address: u64::MAX - 3, bytes: u32::MAX, flags: 0, next: 0 }],
        // Of the other direction.
        &[header(whole, WRITE, 0)],
        &[header(whole, NEXT, 1), header(1, WRITE, 0)],
        // A table of a length that can't be.
        &[header(17, INDIRECT_TABLE, 0)],
    ];
    let mut guest = Guest::ready(INDIRECT);
    let mut other = bystander(&mut guest);
    let reset = other.1.header(Op::Reset, 0);
    for (index, chain) in chains.iter().enumerate() {
        send_chain(&mut guest, &reset, chain);
        assert_eq!(guest.backend.stats().packets_dropped_total, index as u64 + 1, "{chain:?}");
    }
    assert_unharmed(&mut guest, &mut other);
}

#[test]
fn test_chain_when_indirect_tables_are_nested_or_endless_then_dropped() {
    let mut guest = Guest::ready(INDIRECT);
    let mut other = bystander(&mut guest);
    let reset = other.1.header(Op::Reset, 0);
    let table = |bytes| [Descriptor { address: TABLES, bytes, flags: INDIRECT_TABLE, next: 0 }];
    // A table in a table.
    guest.write_descriptor(TABLES, 0, table(16)[0]);
    send_chain(&mut guest, &reset, &table(16));
    // A header and then one byte, for ever: bounded by the number of pieces.
    guest.write_descriptor(TABLES, 0, Descriptor { address: TX_BUFFERS, bytes: 44, flags: NEXT, next: 1 });
    guest.write_descriptor(TABLES, 1, Descriptor { address: TX_BUFFERS, bytes: 1, flags: NEXT, next: 1 });
    send_chain(&mut guest, &reset, &table(0xFFFF * 16));
    assert_eq!(guest.backend.stats().packets_dropped_total, 2);
    assert_unharmed(&mut guest, &mut other);
}

#[test]
fn test_ring_when_the_available_index_jumps_then_stopped_until_set_up_again() {
    for ring in [RX, TX] {
        let mut guest = Guest::ready(0);
        let (mut socket, _) = guest.open_from_host(1024);
        let jump = guest.rings[ring].next_available.wrapping_add(RING_SIZE + 1);
        guest.write(guest.rings[ring].available + 2, &jump.to_le_bytes());
        guest.kick(ring);
        if ring == RX {
            // Makes the backend look for a buffer.
            socket.write_all(b"x").unwrap();
        }
        // From now on a CONNECT is refused instead of left waiting.
        guest::wait_until(|| is_closed(&mut guest.dial(1)));
        guest.reboot();
        assert!(is_closed(&mut socket));
        guest.assert_works();
    }
}

#[test]
fn test_ring_when_a_head_is_out_of_the_table_then_stopped() {
    let mut guest = Guest::ready(0);
    guest.publish(TX, RING_SIZE);
    guest.kick(TX);
    guest::wait_until(|| is_closed(&mut guest.dial(1)));
    assert_eq!(guest.backend.error(), None);
    guest.reboot();
    guest.assert_works();
}

#[test]
fn test_buffer_when_unusable_then_returned_empty_and_the_next_one_used() {
    let mut guest = Guest::new(0);
    guest.start_rings([0, 0]);
    let table = guest.rings[RX].descriptors;
    let unusable = [
        Descriptor { address: RX_BUFFERS, bytes: 43, flags: WRITE, next: 0 },
        Descriptor { address: RX_BUFFERS, bytes: 4096, flags: 0, next: 0 },
        Descriptor { address: 0, bytes: 4096, flags: WRITE, next: 0 },
        Descriptor { address: RX_BUFFERS, bytes: 4096, flags: WRITE | NEXT, next: 2 },
    ];
    for (index, descriptor) in unusable.iter().enumerate() {
        guest.write_descriptor(table, index as u16, *descriptor);
        guest.publish(RX, index as u16);
    }
    guest.post_buffer(10, RX_BUFFER_BYTES);
    guest.kick(RX);
    let _socket = guest.dial(1024);
    for index in 0..unusable.len() as u16 {
        assert_eq!(guest.wait_used(RX), (index, 0));
    }
    assert_eq!(guest.receive().0.op, Op::Request);
}

#[test]
fn test_buffer_when_there_is_room_for_a_header_only_then_data_skips_it() {
    let mut guest = Guest::ready(0);
    guest.repost = false;
    let (mut socket, peer) = guest.open_from_host(1024);
    // Use up the good ones, then offer two without room for data and a good one.
    while guest.used_index(RX) != RING_SIZE {
        socket.write_all(&[7; 4052]).unwrap();
        guest.receive_data(peer, 4052);
    }
    for index in [0, 1] {
        guest.post_buffer(index, HEADER_BYTES as u32);
    }
    guest.post_buffer(2, RX_BUFFER_BYTES);
    guest.kick(RX);
    socket.write_all(b"data").unwrap();
    assert_eq!([guest.wait_used(RX), guest.wait_used(RX)], [(0, 0), (1, 0)]);
    assert_eq!(guest.receive_data(peer, 4), b"data");
}

#[test]
fn test_flood_when_answers_are_never_taken_then_packets_wait_and_memory_is_bounded() {
    let mut guest = Guest::new(0);
    guest.start_rings([0, 0]);
    let stray = Peer { guest_port: 1, host_port: 2 };
    guest.write(TX_BUFFERS, &stray.header(Op::Data, 0).encode());
    let table = guest.rings[TX].descriptors;
    for index in 0..RING_SIZE {
        let descriptor = Descriptor { address: TX_BUFFERS, bytes: 44, flags: 0, next: 0 };
        guest.write_descriptor(table, index, descriptor);
    }
    // Three rings full: the third is taken in part only.
    let mut taken = 0;
    for index in 0..3 * RING_SIZE {
        guest.publish(TX, index % RING_SIZE);
        guest.kick(TX);
        if guest.try_wait_used(TX, Duration::from_millis(50)).is_none() {
            break;
        }
        taken += 1;
    }
    assert_eq!(taken, MAX_RESETS);
    // With buffers it goes on by itself.
    guest.post_all_buffers();
    for _ in 0..MAX_RESETS {
        assert_eq!(guest.receive().0.op, Op::Reset);
    }
    guest.wait_used(TX);
    assert_eq!(guest.receive().0.op, Op::Reset);
    guest.assert_works();
}

#[test]
fn test_requests_when_a_guest_makes_thousands_then_the_number_of_connections_is_bounded() {
    let mut guest = Guest::ready(0);
    let listener = guest.listen(5000);
    listener.set_nonblocking(true).unwrap();
    let (mut accepted, mut refused) = (Vec::new(), 0);
    for port in 0..600 {
        let peer = Peer { guest_port: port, host_port: 5000 };
        guest.send_op(peer, Op::Request);
        let (reply, _) = guest.receive();
        match reply.op {
            Op::Response => accepted.push(listener.accept().unwrap()),
            _ => refused += 1,
        }
    }
    assert_eq!((accepted.len(), refused), (casemate_vhost_vsock::MAX_CONNECTIONS, 600 - accepted.len()));
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        8 => (0u64..MEMORY_BYTES as u64).prop_map(|offset| BASE + offset),
        1 => any::<u64>(),
        1 => Just(BASE + MEMORY_BYTES as u64 - 1),
    ];
    let bytes = prop_oneof![4 => 0u32..8192, 1 => Just(44u32), 1 => any::<u32>()];
    let next = prop_oneof![4 => 0u16..16, 1 => any::<u16>()];
    (address, bytes, 0u16..8, next).prop_map(|(address, bytes, flags, next)| Descriptor {
        address,
        bytes,
        flags,
        next,
    })
}

fn any_header() -> impl Strategy<Value = Header> {
    let port =
        || prop_oneof![Just(99u32), Just(1024), Just(1 << 30), Just((1 << 30) + 1), Just(5000), any::<u32>()];
    let cid = || prop_oneof![4 => Just(u64::from(guest::CID)), 4 => Just(2u64), 1 => any::<u64>()];
    let counts = (any::<u32>(), prop_oneof![Just(0u32), any::<u32>()]);
    (cid(), cid(), port(), port(), prop_oneof![0u32..5000, any::<u32>()], 0u16..3, 0u16..9, 0u32..4, counts)
        .prop_map(
            |(
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                data_bytes,
                socket_type,
                op,
                flags,
                (buf_alloc, fwd_cnt),
            )| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                data_bytes,
                socket_type,
                op: Op::from_wire(op),
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Descriptor tables, heads and indices of any kind, in both rings, with a connection open.
    #[test]
    fn test_rings_when_filled_with_anything_then_the_backend_lives(
        rx in prop::collection::vec(any_descriptor(), 16),
        tx in prop::collection::vec(any_descriptor(), 16),
        table in prop::collection::vec(any_descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![8 => 0u16..16, 1 => any::<u16>()], 1..40),
        jump in prop_oneof![4 => Just(0u16), 1 => any::<u16>()],
        header in any_header(),
        features in prop_oneof![Just(0), Just(EVENT_INDEX), Just(INDIRECT), Just(EVENT_INDEX | INDIRECT)],
    ) {
        let mut guest = Guest::ready(features);
        let (mut socket, _) = guest.open_from_host(1024);
        for (index, descriptor) in table.iter().enumerate() {
            guest.write_descriptor(TABLES, index as u16, *descriptor);
        }
        for (ring, descriptors) in [(RX, &rx), (TX, &tx)] {
            for (index, descriptor) in descriptors.iter().enumerate() {
                guest.write_descriptor(guest.rings[ring].descriptors, index as u16, *descriptor);
            }
        }
        for address in (BASE + (2 << 20)..BASE + (3 << 20)).step_by(4096) {
            guest.write(address, &header.encode());
        }
        for head in heads {
            guest.publish(TX, head);
            guest.publish(RX, head);
            guest.kick(TX);
            guest.kick(RX);
        }
        let next = guest.rings[TX].next_available.wrapping_add(jump);
        guest.write(guest.rings[TX].available + 2, &next.to_le_bytes());
        guest.kick(TX);
        let _ = socket.write_all(&[1; 3000]);
        guest.sync();
        guest.reboot();
        guest.assert_works();
    }

    /// Well-formed chains with packets of any kind.
    #[test]
    fn test_packets_when_of_any_kind_then_the_backend_lives(
        packets in prop::collection::vec((any_header(), 0usize..5000), 1..60),
    ) {
        let mut guest = Guest::ready(0);
        let listener = guest.listen(5000);
        let (mut socket, _) = guest.open_from_host(1024);
        for (header, bytes) in packets {
            guest.send(&header, &vec![0; bytes]);
            while guest.try_receive(Duration::ZERO).is_some() {}
            let _ = socket.write(b"x");
        }
        drop(listener);
        guest.reboot();
        guest.assert_works();
    }
}
