//! A guest and its VMM without a virtual machine: rings in a memfd, driven by hand, behind a vhost-user frontend.
//!
//! Each test file uses a part of it.
#![allow(dead_code)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use casemate_vhost_vsock::packet::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};
use casemate_vhost_vsock::{Timeouts, VsockBackend};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub const CID: u32 = 7;
pub const RING_SIZE: u16 = 128;
pub const RX: usize = 0;
pub const TX: usize = 1;
pub const DEADLINE: Duration = Duration::from_secs(5);
pub const WINDOW: u32 = 1 << 20;

pub const EVENT_INDEX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_TABLE: u16 = 4;

pub const MEMORY_BYTES: usize = 8 << 20;
/// Memory begins above zero, so that small addresses are outside.
pub const BASE: u64 = 1 << 20;
pub const TABLES: u64 = BASE + 0x1_0000;
pub const RX_BUFFERS: u64 = BASE + (1 << 20);
pub const RX_BUFFER_BYTES: u32 = 4096;
pub const TX_BUFFERS: u64 = BASE + (4 << 20);

/// One ring as its driver sees it.
pub struct Ring {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub next_available: u16,
    pub last_used: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub bytes: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

pub struct Guest {
    pub directory: tempfile::TempDir,
    pub backend: VsockBackend,
    pub frontend: Frontend,
    pub memory: GuestMemoryMmap<()>,
    pub rings: [Ring; 2],
    pub features: u64,
    /// Data that came while something else was waited for is an error: tests say what they expect.
    pub repost: bool,
}

fn ring_at(index: u64) -> Ring {
    let base = BASE + index * 0x8000;
    Ring {
        descriptors: base,
        available: base + 0x2000,
        used: base + 0x4000,
        next_available: 0,
        last_used: 0,
        kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
    }
}

impl Guest {
    /// Backend and frontend, features agreed on, memory shared, rings not set up.
    pub fn new(features: u64) -> Self {
        Self::with_timeouts(features, Timeouts::default())
    }

    pub fn with_timeouts(features: u64, timeouts: Timeouts) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let backend =
            VsockBackend::start_with(theirs.into(), &directory.path().join("v"), CID, timeouts).unwrap();
        let mut frontend = Frontend::from_stream(ours, 3);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(offered, 1 << 32 | EVENT_INDEX | INDIRECT | protocol);
        let offered = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(offered & !VhostUserProtocolFeatures::MQ).unwrap();
        frontend.set_features(1 << 32 | protocol | features).unwrap();
        // SAFETY: the name is a C string; the descriptor that comes back has no other owner.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) });
        file.set_len(MEMORY_BYTES as u64).unwrap();
        let range = (GuestAddress(BASE), MEMORY_BYTES, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let region =
            VhostUserMemoryRegionInfo::from_guest_region(memory.find_region(GuestAddress(BASE)).unwrap())
                .unwrap();
        frontend.set_mem_table(&[region]).unwrap();
        let rings = [ring_at(0), ring_at(1)];
        Self { directory, backend, frontend, memory, rings, features, repost: true }
    }

    /// A guest whose driver runs, with all its receive buffers posted.
    pub fn ready(features: u64) -> Self {
        let mut guest = Self::new(features);
        guest.start_rings([0, 0]);
        guest.post_all_buffers();
        guest
    }

    pub fn host_address(&self, address: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(address)).unwrap() as u64
    }

    /// Set up and enable both rings, the next available entries being those given.
    pub fn start_rings(&mut self, bases: [u16; 2]) {
        for (index, base) in bases.into_iter().enumerate() {
            let ring = &self.rings[index];
            let config = VringConfigData {
                queue_max_size: RING_SIZE,
                queue_size: RING_SIZE,
                flags: 0,
                desc_table_addr: self.host_address(ring.descriptors),
                used_ring_addr: self.host_address(ring.used),
                avail_ring_addr: self.host_address(ring.available),
                log_addr: None,
            };
            self.frontend.set_vring_num(index, RING_SIZE).unwrap();
            self.frontend.set_vring_base(index, base).unwrap();
            self.frontend.set_vring_addr(index, &config).unwrap();
            self.frontend.set_vring_call(index, &ring.call).unwrap();
            self.frontend.set_vring_kick(index, &ring.kick).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
        }
        self.sync();
    }

    /// Stop both rings; return their next available entries.
    pub fn stop_rings(&mut self) -> [u16; 2] {
        [0, 1].map(|index| self.frontend.get_vring_base(index).unwrap() as u16)
    }

    /// As a reboot does: stopped, cleared, set up anew.
    pub fn reboot(&mut self) {
        self.stop_rings();
        self.memory.write_slice(&[0; 0x10000], GuestAddress(BASE)).unwrap();
        for ring in &mut self.rings {
            (ring.next_available, ring.last_used) = (0, 0);
        }
        self.start_rings([0, 0]);
        self.post_all_buffers();
    }

    /// Wait until every request so far has been handled (requests are answered in order).
    pub fn sync(&mut self) {
        self.frontend.get_features().unwrap();
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn write_descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.write(table + u64::from(index) * 16, &descriptor.encode());
    }

    /// Make the chain that begins at `head` available, without a kick.
    pub fn publish(&mut self, ring: usize, head: u16) {
        let ring = &mut self.rings[ring];
        let slot = ring.available + 4 + u64::from(ring.next_available % RING_SIZE) * 2;
        self.memory.write_slice(&head.to_le_bytes(), GuestAddress(slot)).unwrap();
        ring.next_available = ring.next_available.wrapping_add(1);
        self.memory
            .store(ring.next_available.to_le(), GuestAddress(ring.available + 2), Ordering::Release)
            .unwrap();
    }

    pub fn kick(&self, ring: usize) {
        self.rings[ring].kick.write(1).unwrap();
    }

    pub fn used_index(&self, ring: usize) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(self.rings[ring].used + 2), Ordering::Acquire).unwrap())
    }

    /// Wait for a used entry; its head and length.
    pub fn wait_used(&mut self, ring: usize) -> (u16, u32) {
        self.try_wait_used(ring, DEADLINE).expect("no buffer came back in time")
    }

    pub fn try_wait_used(&mut self, ring: usize, limit: Duration) -> Option<(u16, u32)> {
        let deadline = Instant::now() + limit;
        while self.used_index(ring) == self.rings[ring].last_used {
            if self.features & EVENT_INDEX != 0 {
                self.ask_for_call(ring);
                if self.used_index(ring) != self.rings[ring].last_used {
                    break;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            wait_readable(self.rings[ring].call.as_raw_fd(), left);
            let _ = self.rings[ring].call.read();
        }
        let ring = &mut self.rings[ring];
        let slot = ring.used + 4 + u64::from(ring.last_used % RING_SIZE) * 8;
        ring.last_used = ring.last_used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let bytes: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(u32::from_le(head)).unwrap(), u32::from_le(bytes)))
    }

    /// Event index: be called at the next used entry.
    pub fn ask_for_call(&self, ring: usize) {
        let ring = &self.rings[ring];
        let event = ring.available + 4 + u64::from(RING_SIZE) * 2;
        self.memory.store(ring.last_used.to_le(), GuestAddress(event), Ordering::SeqCst).unwrap();
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    // ---- packets to us ----

    pub fn post_buffer(&mut self, index: u16, bytes: u32) {
        let address = RX_BUFFERS + u64::from(index) * u64::from(RX_BUFFER_BYTES);
        let descriptor = Descriptor { address, bytes, flags: WRITE, next: 0 };
        self.write_descriptor(self.rings[RX].descriptors, index, descriptor);
        self.publish(RX, index);
    }

    pub fn post_all_buffers(&mut self) {
        for index in 0..RING_SIZE {
            self.post_buffer(index, RX_BUFFER_BYTES);
        }
        self.kick(RX);
    }

    /// The next packet from the host.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        self.try_receive(DEADLINE).expect("no packet came in time")
    }

    pub fn try_receive(&mut self, limit: Duration) -> Option<(Header, Vec<u8>)> {
        let (head, bytes) = self.try_wait_used(RX, limit)?;
        assert!(bytes as usize >= HEADER_BYTES, "a buffer came back with {bytes} bytes");
        let address = RX_BUFFERS + u64::from(head) * u64::from(RX_BUFFER_BYTES);
        let mut packet = vec![0; bytes as usize];
        self.memory.read_slice(&mut packet, GuestAddress(address)).unwrap();
        if self.repost {
            self.post_buffer(head, RX_BUFFER_BYTES);
            self.kick(RX);
        }
        let header = Header::decode(packet[..HEADER_BYTES].try_into().unwrap());
        assert_eq!(header.data_bytes as usize, packet.len() - HEADER_BYTES);
        assert_eq!(header.dst_cid, u64::from(CID));
        Some((header, packet.split_off(HEADER_BYTES)))
    }

    /// The next packet, which has to be `op` for `peer`.
    pub fn expect(&mut self, op: Op, peer: Peer) -> Header {
        let (header, _) = self.receive();
        assert_eq!((header.op, header.src_port, header.dst_port), (op, peer.host_port, peer.guest_port));
        header
    }

    /// Data packets of `peer` until `bytes` are there.
    pub fn receive_data(&mut self, peer: Peer, bytes: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < bytes {
            let (header, data) = self.receive();
            if header.op == Op::CreditUpdate {
                continue;
            }
            assert_eq!(
                (header.op, header.src_port, header.dst_port),
                (Op::Data, peer.host_port, peer.guest_port)
            );
            all.extend(data);
        }
        all
    }

    // ---- packets from us ----

    /// Lay `packet` out in pieces of the given sizes (the last takes the rest) and send it; wait until it was taken.
    pub fn send_split(&mut self, header: &Header, data: &[u8], sizes: &[usize], indirect: bool) {
        let mut packet = header.encode().to_vec();
        packet.extend_from_slice(data);
        self.write(TX_BUFFERS, &packet);
        let mut pieces = Vec::new();
        let mut at = 0;
        for size in sizes.iter().copied().chain([packet.len()]) {
            let size = size.min(packet.len() - at);
            if size > 0 {
                pieces.push((TX_BUFFERS + at as u64, size as u32));
            }
            at += size;
        }
        self.publish_pieces(&pieces, indirect);
        self.kick(TX);
        self.wait_used(TX);
    }

    pub fn publish_pieces(&mut self, pieces: &[(u64, u32)], indirect: bool) {
        let table = if indirect { TABLES } else { self.rings[TX].descriptors };
        for (index, (address, bytes)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let (flags, next) = if last { (0, 0) } else { (NEXT, index as u16 + 1) };
            self.write_descriptor(
                table,
                index as u16,
                Descriptor { address: *address, bytes: *bytes, flags, next },
            );
        }
        if indirect {
            let bytes = pieces.len() as u32 * 16;
            let descriptor = Descriptor { address: table, bytes, flags: INDIRECT_TABLE, next: 0 };
            self.write_descriptor(self.rings[TX].descriptors, 0, descriptor);
        }
        self.publish(TX, 0);
    }

    pub fn send(&mut self, header: &Header, data: &[u8]) {
        self.send_split(header, data, &[HEADER_BYTES], false);
    }

    pub fn send_op(&mut self, peer: Peer, op: Op) {
        self.send(&peer.header(op, 0), &[]);
    }

    pub fn send_data(&mut self, peer: Peer, data: &[u8]) {
        self.send(&peer.header(Op::Data, data.len()), data);
    }

    // ---- connections ----

    pub fn uds_path(&self) -> PathBuf {
        self.directory.path().join("v")
    }

    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("v_{port}"))).unwrap()
    }

    /// A program of the host asks for `port`.
    pub fn dial(&self, port: u32) -> UnixStream {
        let mut socket = UnixStream::connect(self.uds_path()).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        socket.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        socket
    }

    /// A connection that the host began and the guest accepted.
    pub fn open_from_host(&mut self, port: u32) -> (UnixStream, Peer) {
        let mut socket = self.dial(port);
        let (header, _) = self.receive();
        assert_eq!((header.op, header.dst_port), (Op::Request, port));
        let peer = Peer { guest_port: port, host_port: header.src_port };
        self.send_op(peer, Op::Response);
        assert_eq!(read_line(&mut socket), format!("OK {}\n", peer.host_port));
        (socket, peer)
    }

    /// A connection that the guest began and the host accepted.
    pub fn open_from_guest(
        &mut self,
        listener: &UnixListener,
        host_port: u32,
        guest_port: u32,
    ) -> (UnixStream, Peer) {
        let peer = Peer { guest_port, host_port };
        self.send_op(peer, Op::Request);
        self.expect(Op::Response, peer);
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        (socket, peer)
    }

    /// Whether a new connection works in both directions: the backend is alive and in order.
    pub fn assert_works(&mut self) {
        let (mut socket, peer) = self.open_from_host(99);
        socket.write_all(b"ping").unwrap();
        assert_eq!(self.receive_data(peer, 4), b"ping");
        self.send_data(peer, b"pong");
        let mut answer = [0; 4];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"pong");
        self.send_op(peer, Op::Reset);
        assert_eq!(socket.read(&mut answer).unwrap(), 0);
        assert_eq!(self.backend.error(), None);
    }

    /// Wait until the backend's counters satisfy `condition`.
    pub fn wait_stats(&self, condition: impl Fn(&casemate_vhost_vsock::Stats) -> bool) {
        wait_until(|| condition(&self.backend.stats()));
    }
}

/// A connection as the guest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub guest_port: u32,
    pub host_port: u32,
}

impl Peer {
    pub fn header(self, op: Op, data_bytes: usize) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            data_bytes: data_bytes as u32,
            socket_type: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: WINDOW,
            fwd_cnt: 0,
        }
    }
}

pub fn read_line(socket: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        if socket.read(&mut byte).unwrap() == 0 {
            break;
        }
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

/// Whether the other side is gone (end of file or reset), within the socket's time.
pub fn is_closed(socket: &mut UnixStream) -> bool {
    match socket.read(&mut [0]) {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

pub fn wait_readable(fd: i32, limit: Duration) {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd is passed, and it is writable.
    unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as i32 + 1) };
}

/// For what has no event to wait for; fails after [`DEADLINE`].
pub fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "it did not come true in time");
        std::thread::sleep(Duration::from_micros(200));
    }
}

pub fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index % 251) as u8).collect()
}
