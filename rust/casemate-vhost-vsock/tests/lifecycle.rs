//! Start, stop, and what the VMM does in between.
#![allow(clippy::unwrap_used, missing_docs)]

mod guest;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use casemate_vhost_vsock::packet::{Op, SHUTDOWN_BOTH};
use casemate_vhost_vsock::{Timeouts, VhostVsockError, VsockBackend};
use guest::{BASE, CID, EVENT_INDEX, Guest, Peer, RX, TX, is_closed};
use vhost::vhost_user::VhostUserFrontend as _;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend as _, VringConfigData};

#[test]
fn test_start_when_done_then_the_socket_is_there_and_private() {
    let guest = Guest::new(0);
    let mode = std::fs::metadata(guest.uds_path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn test_start_when_it_can_not_be_then_the_cause_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let start = |path: &str, cid| {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        VsockBackend::start(theirs.into(), &directory.path().join(path), cid)
    };
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(start("v", cid), Err(VhostVsockError::ContextId { cid: given }) if given == cid));
    }
    let errno = |result: Result<VsockBackend, VhostVsockError>| match result {
        Err(VhostVsockError::System { source, .. }) => source.raw_os_error(),
        other => panic!("{other:?}"),
    };
    std::fs::write(directory.path().join("taken"), "x").unwrap();
    assert_eq!(errno(start("taken", 3)), Some(libc::EADDRINUSE));
    assert_eq!(std::fs::read(directory.path().join("taken")).unwrap(), b"x");
    assert_eq!(errno(start("missing/v", 3)), Some(libc::ENOENT));
    assert_eq!(errno(start(&"x".repeat(120), 3)), Some(libc::ENAMETOOLONG));
    let file = std::fs::File::open(directory.path().join("taken")).unwrap();
    let result = VsockBackend::start(file.into(), &directory.path().join("v"), 3);
    assert_eq!(errno(result), Some(libc::ENOTSOCK));
    assert!(!directory.path().join("v").exists());
}

#[test]
fn test_configuration_when_read_then_it_is_the_context_id() {
    let mut guest = Guest::new(0);
    let flags = VhostUserConfigFlags::empty();
    let (_, bytes) = guest.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    assert_eq!(bytes, u64::from(CID).to_le_bytes());
    let (_, bytes) = guest.frontend.get_config(4, 2, flags, &[0; 2]).unwrap();
    assert_eq!(bytes, [0, 0]);
}

#[test]
fn test_close_when_connections_are_open_then_all_ends_at_once() {
    let mut guest = Guest::ready(0);
    let (mut socket, _) = guest.open_from_host(1024);
    let mut pending = guest.dial(1025);
    let mut greeting = UnixStream::connect(guest.uds_path()).unwrap();
    greeting.write_all(b"CONN").unwrap();
    guest.wait_stats(|stats| stats.connections_open == 3);
    let begin = Instant::now();
    guest.backend.close().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert!(is_closed(&mut socket) && is_closed(&mut pending) && is_closed(&mut greeting));
    assert!(!guest.uds_path().exists());
    assert_eq!(guest.backend.error(), None);
    // The VMM sees it, and a second close is nothing.
    assert!(guest.frontend.get_features().is_err());
    guest.backend.close().unwrap();
}

#[test]
fn test_close_when_the_vmm_stops_within_a_message_then_it_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let backend = VsockBackend::start(theirs.into(), &directory.path().join("v"), 3).unwrap();
    ours.write_all(&[1, 0, 0]).unwrap();
    let begin = Instant::now();
    backend.close().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn test_vmm_when_gone_then_the_backend_ends_and_says_so() {
    let mut guest = Guest::ready(0);
    let (mut socket, _) = guest.open_from_host(1024);
    let Guest { backend, frontend, directory, .. } = guest;
    drop(frontend);
    assert!(is_closed(&mut socket));
    guest::wait_until(|| backend.error().is_some());
    assert_eq!(backend.error().unwrap(), "the VMM closed the vhost-user connection");
    assert!(!directory.path().join("v").exists());
    backend.close().unwrap();
    assert_eq!(backend.error(), None);
}

#[test]
fn test_vmm_when_it_breaks_the_protocol_then_the_error_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let backend = VsockBackend::start(theirs.into(), &directory.path().join("v"), 3).unwrap();
    ours.write_all(&[0xFF; 12]).unwrap();
    guest::wait_until(|| backend.error().is_some());
    assert!(backend.error().unwrap().starts_with("vhost-user request: "));
    let mut rest = Vec::new();
    ours.read_to_end(&mut rest).unwrap();
}

#[test]
fn test_drop_when_not_closed_then_the_thread_ends_by_itself() {
    let guest = Guest::ready(0);
    let path = guest.uds_path();
    let Guest { backend, frontend, directory, .. } = guest;
    drop(backend);
    guest::wait_until(|| !path.exists());
    drop((frontend, directory));
}

#[test]
fn test_close_when_the_path_was_replaced_then_the_other_file_stays() {
    let guest = Guest::new(0);
    std::fs::remove_file(guest.uds_path()).unwrap();
    std::fs::write(guest.uds_path(), "another").unwrap();
    guest.backend.close().unwrap();
    assert_eq!(std::fs::read(guest.uds_path()).unwrap(), b"another");
}

#[test]
fn test_pause_when_the_rings_go_on_where_they_stopped_then_connections_live() {
    for features in [0, EVENT_INDEX] {
        let mut guest = Guest::ready(features);
        let (mut socket, peer) = guest.open_from_host(1024);
        let bases = guest.stop_rings();
        // Written while the guest is paused: it waits in the socket.
        socket.write_all(b"while paused").unwrap();
        assert!(is_closed(&mut guest.dial(1)));
        guest.start_rings(bases);
        assert_eq!(guest.receive_data(peer, 12), b"while paused");
        guest.send_data(peer, b"after");
        let mut text = [0; 5];
        socket.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"after");
    }
}

#[test]
fn test_reboot_when_the_rings_begin_anew_then_old_connections_are_closed() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.send_data(peer, b"before");
    guest.reboot();
    let mut text = Vec::new();
    socket.read_to_end(&mut text).unwrap();
    assert_eq!(text, b"before");
    guest.assert_works();
}

#[test]
fn test_reset_device_when_asked_then_connections_are_closed_and_features_asked_for_again() {
    let mut guest = Guest::ready(0);
    let (mut socket, _) = guest.open_from_host(1024);
    guest.frontend.reset_device().unwrap();
    guest.sync();
    assert!(is_closed(&mut socket));
    assert!(is_closed(&mut guest.dial(1)));
}

#[test]
fn test_ring_when_disabled_then_nothing_is_taken_until_enabled() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    guest.frontend.set_vring_enable(TX, false).unwrap();
    guest.sync();
    guest.write(guest::TX_BUFFERS, &peer.header(Op::Reset, 0).encode());
    guest.publish_pieces(&[(guest::TX_BUFFERS, 44)], false);
    guest.kick(TX);
    assert_eq!(guest.try_wait_used(TX, Duration::from_millis(20)), None);
    guest.frontend.set_vring_enable(TX, true).unwrap();
    guest.wait_used(TX);
    assert!(is_closed(&mut socket));
}

#[test]
fn test_ring_when_its_addresses_or_size_can_not_be_then_not_served_and_a_right_one_is() {
    let mut guest = Guest::new(0);
    for (size, descriptors) in [(100, 0), (128, guest::MEMORY_BYTES as u64 - 16), (128, 1 << 40)] {
        for index in [RX, TX] {
            let ring = &guest.rings[index];
            let first = guest.host_address(BASE);
            let config = VringConfigData {
                queue_max_size: 128,
                queue_size: 128,
                flags: 0,
                desc_table_addr: first + descriptors,
                avail_ring_addr: first + 0x2000,
                used_ring_addr: first + 0x4000,
                log_addr: None,
            };
            guest.frontend.set_vring_num(index, size).unwrap();
            guest.frontend.set_vring_base(index, 0).unwrap();
            guest.frontend.set_vring_addr(index, &config).unwrap();
            guest.frontend.set_vring_call(index, &ring.call).unwrap();
            guest.frontend.set_vring_kick(index, &ring.kick).unwrap();
            guest.frontend.set_vring_enable(index, true).unwrap();
        }
        guest.sync();
        assert!(is_closed(&mut guest.dial(1)));
        guest.stop_rings();
    }
    guest.start_rings([0, 0]);
    guest.post_all_buffers();
    guest.assert_works();
}

#[test]
fn test_memory_when_a_region_comes_and_goes_then_connections_live() {
    let mut guest = Guest::ready(0);
    let (mut socket, peer) = guest.open_from_host(1024);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let region = vhost::VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 32,
        memory_size: 1 << 20,
        userspace_addr: 1 << 40,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&file),
    };
    assert!(guest.frontend.get_max_mem_slots().unwrap() >= 32);
    guest.frontend.add_mem_region(&region).unwrap();
    guest.sync();
    // A packet whose data lies in the new region.
    std::os::unix::fs::FileExt::write_all_at(&file, b"from afar", 4096).unwrap();
    guest.write(guest::TX_BUFFERS, &peer.header(Op::Data, 9).encode());
    guest.publish_pieces(&[(guest::TX_BUFFERS, 44), ((1 << 32) + 4096, 9)], false);
    guest.kick(TX);
    guest.wait_used(TX);
    let mut text = [0; 9];
    socket.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from afar");
    guest.frontend.remove_mem_region(&region).unwrap();
    guest.sync();
    guest.publish_pieces(&[(guest::TX_BUFFERS, 44), ((1 << 32) + 4096, 9)], false);
    guest.kick(TX);
    guest.wait_used(TX);
    assert_eq!(guest.backend.stats().packets_dropped_total, 1);
    guest.assert_works();
}

#[test]
fn test_timeouts_when_the_guest_never_answers_a_request_then_reset_and_closed() {
    let mut guest =
        Guest::with_timeouts(0, Timeouts { connect: Duration::from_millis(300), ..Timeouts::default() });
    guest.start_rings([0, 0]);
    guest.post_all_buffers();
    let mut asked = guest.dial(9);
    let (request, _) = guest.receive();
    guest.expect(Op::Reset, Peer { guest_port: 9, host_port: request.src_port });
    assert!(is_closed(&mut asked));
    assert_eq!(guest.backend.stats().connections_open, 0);
}

#[test]
fn test_timeouts_when_the_guest_never_answers_a_shutdown_then_reset() {
    let mut guest =
        Guest::with_timeouts(0, Timeouts { close: Duration::from_millis(30), ..Timeouts::default() });
    guest.start_rings([0, 0]);
    guest.post_all_buffers();
    let (socket, peer) = guest.open_from_host(1024);
    drop(socket);
    assert_eq!(guest.expect(Op::Shutdown, peer).flags, SHUTDOWN_BOTH);
    guest.expect(Op::Reset, peer);
    assert_eq!(guest.backend.stats().connections_open, 0);
}

#[test]
fn test_timeouts_when_the_host_never_finishes_its_line_then_closed() {
    let timeouts = Timeouts { connect: Duration::from_millis(40), ..Timeouts::default() };
    let guest = Guest::with_timeouts(0, timeouts);
    let mut socket = UnixStream::connect(guest.uds_path()).unwrap();
    socket.set_read_timeout(Some(guest::DEADLINE)).unwrap();
    socket.write_all(b"CONNECT 1").unwrap();
    assert!(is_closed(&mut socket));
}
