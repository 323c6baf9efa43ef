//! All connections of one guest: who they are, what they may do next, when they are over.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::chain::{Memory, truncate};
use crate::endpoint::{Deaf, Endpoint, Received};
use crate::greeting::{self, Greeting, MAX_LINE_BYTES};
use crate::outlet::{Batch, take_buffer};
use crate::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::ring::Ring;
use crate::stats::Counters;
use crate::stream::{Stream, Verdict};
use crate::unix::connect_now;

/// Most connections at once, in any state.
pub const MAX_CONNECTIONS: usize = 512;
/// Receive window of a connection.
pub const WINDOW_BYTES: u32 = 256 << 10;
/// Receive window of connections beyond the first [`CROWD`].
pub const CROWDED_WINDOW_BYTES: u32 = 64 << 10;
/// From this many connections on, windows are small.
pub const CROWD: usize = 64;
/// Most RST packets that wait for buffers of the guest before its packets are no longer read.
pub const MAX_RESETS: usize = 256;
/// How long the backend waits for others.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From the accept of a host socket to the guest's answer: 10 s.
    pub connect: Duration,
    /// From our last word to the guest's RST: 8 s, as the kernel's own.
    pub close: Duration,
    /// From the moment that the guest's window is full to the question whether it really is: 0.2 s.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            close: Duration::from_secs(8),
            stall: Duration::from_millis(200),
        }
    }
}

/// Ports of the host's side of connections that the host began.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// A connection's two ports; both context ids are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    host_port: u32,
    guest_port: u32,
}

#[derive(Debug)]
enum State {
    /// The host has not finished its CONNECT line.
    Greeting,
    /// The guest knows, or is about to know, the connection.
    Attached { key: Key, stream: Stream },
    /// The guest is done with it, the host has not taken everything.
    Detached,
}

#[derive(Debug)]
struct Connection {
    endpoint: Endpoint,
    state: State,
    queued: bool,
    batch: Batch,
    deadline: Option<Instant>,
}

/// What is left to do after [`Mux::fill`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// Nothing.
    Idle,
    /// Something, in the next turn.
    More,
    /// Something, when the guest has given buffers.
    Starved,
}

/// What comes of a connection after a change.
enum Fate {
    Keep,
    Drop,
    Reset,
}

/// The connections and what they share.
#[derive(Debug)]
pub struct Mux {
    guest_cid: u64,
    uds_path: PathBuf,
    epoll: Arc<Epoll>,
    counters: Arc<Counters>,
    timeouts: Timeouts,
    guest_ready: bool,
    connections: HashMap<u64, Connection>,
    ids: HashMap<Key, u64>,
    deadlines: BTreeSet<(Instant, u64)>,
    queue: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_id: u64,
    next_port: u32,
}

impl Mux {
    /// No connections yet. Events of host sockets come under tokens from `first_token` on.
    pub fn new(
        guest_cid: u32,
        uds_path: PathBuf,
        epoll: Arc<Epoll>,
        first_token: u64,
        counters: Arc<Counters>,
        timeouts: Timeouts,
    ) -> Self {
        Self {
            guest_cid: u64::from(guest_cid),
            uds_path,
            epoll,
            counters,
            timeouts,
            guest_ready: false,
            connections: HashMap::new(),
            ids: HashMap::new(),
            deadlines: BTreeSet::new(),
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: first_token,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// Say whether the guest's rings run: only then a CONNECT has a chance.
    pub fn set_guest_ready(&mut self, ready: bool) {
        self.guest_ready = ready;
    }

    /// Whether packets of the guest may be read: their answers have room.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Whether something waits for buffers of the guest.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.queue.is_empty()
    }

    /// When [`Mux::expire`] has to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    // ---- the table ----

    fn insert(&mut self, endpoint: Endpoint, state: State) -> Option<u64> {
        let id = self.next_id;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, id);
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, endpoint.as_raw_fd(), event) {
            log::warn!("a vsock connection can't be watched: {error}");
            return None;
        }
        self.next_id += 1;
        if let State::Attached { key, .. } = state {
            self.ids.insert(key, id);
        }
        let connection =
            Connection { endpoint, state, queued: false, batch: Batch::default(), deadline: None };
        self.connections.insert(id, connection);
        self.counters.connections_total.add(1);
        self.counters.connections_open.set(self.connections.len() as u64);
        Some(id)
    }

    fn remove(&mut self, id: u64) {
        self.set_deadline(id, None);
        let Some(connection) = self.connections.remove(&id) else { return };
        if let State::Attached { key, .. } = connection.state {
            self.ids.remove(&key);
        }
        // Explicit, as the registration outlives our descriptor where a forked child holds a duplicate.
        let fd = connection.endpoint.as_raw_fd();
        if let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
            log::warn!("a vsock connection can't be forgotten: {error}");
        }
        self.counters.connections_open.set(self.connections.len() as u64);
    }

    fn set_deadline(&mut self, id: u64, deadline: Option<Instant>) {
        if let Some(connection) = self.connections.get_mut(&id) {
            if let Some(former) = std::mem::replace(&mut connection.deadline, deadline) {
                self.deadlines.remove(&(former, id));
            }
            if let Some(deadline) = deadline {
                self.deadlines.insert((deadline, id));
            }
        }
    }

    fn header(&self, key: Key, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            data_bytes: 0,
            socket_type: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Forget the connection and say so to the guest.
    fn reset(&mut self, id: u64) {
        if let Some(Connection { state: State::Attached { key, .. }, .. }) = self.connections.get(&id) {
            let header = self.header(*key, Op::Reset);
            self.push_reset(header);
        }
        self.remove(id);
    }

    fn push_reset(&mut self, header: Header) {
        self.counters.resets_total.add(1);
        self.resets.push_back(header);
    }

    /// The guest is done with the connection: flush what the host has not taken, then close.
    fn detach(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let State::Attached { key, .. } = std::mem::replace(&mut connection.state, State::Detached) {
            self.ids.remove(&key);
            // Whoever writes on would wait for a reader that is gone.
            connection.endpoint.shutdown(Shutdown::Read);
        }
        self.set_deadline(id, None);
        self.settle(id);
    }

    fn window_bytes(&self) -> u32 {
        if self.connections.len() < CROWD { WINDOW_BYTES } else { CROWDED_WINDOW_BYTES }
    }

    /// Draw the conclusions from whatever changed on a connection.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let endpoint = &mut connection.endpoint;
        let fate = match &mut connection.state {
            State::Greeting => Fate::Keep,
            State::Detached if endpoint.has_backlog() && !endpoint.is_hung_up() => Fate::Keep,
            State::Detached => Fate::Drop,
            State::Attached { stream, .. } => {
                let stalled = endpoint.is_readable() && stream.sendable_bytes() == 0;
                // While the rest can be read at once, the guest is better told everything in one packet after it.
                if endpoint.is_hung_up() && (stalled || !endpoint.is_readable()) {
                    endpoint.drop_backlog();
                    stream.on_host_deaf();
                    if !endpoint.is_readable() || !stream.guest_receives() {
                        stream.on_host_end();
                    }
                }
                if stalled && stream.is_starving() && connection.deadline.is_none() {
                    let deadline = Instant::now() + self.timeouts.stall;
                    connection.deadline = Some(deadline);
                    self.deadlines.insert((deadline, id));
                }
                let flushed = !endpoint.has_backlog();
                match (stream.guest_sends(), stream.guest_receives()) {
                    (false, false) if flushed => Fate::Reset,
                    _ if stream.is_requested() && endpoint.is_hung_up() => {
                        if stream.awaits_response() {
                            Fate::Reset
                        } else {
                            Fate::Drop
                        }
                    }
                    (sends, receives) => {
                        if !sends && flushed {
                            endpoint.shutdown(Shutdown::Write);
                        }
                        if !receives {
                            endpoint.shutdown(Shutdown::Read);
                        }
                        let due =
                            stream.has_control() || endpoint.is_readable() && stream.sendable_bytes() > 0;
                        if due && !connection.queued {
                            connection.queued = true;
                            self.queue.push_back(id);
                        }
                        Fate::Keep
                    }
                }
            }
        };
        match fate {
            Fate::Keep => {}
            Fate::Drop => self.remove(id),
            Fate::Reset => self.reset(id),
        }
    }

    // ---- the host's side ----

    /// Take a socket that a program of the host connected.
    pub fn on_accept(&mut self, socket: UnixStream, now: Instant) {
        if self.connections.len() >= MAX_CONNECTIONS {
            log::debug!("vsock connection refused: {MAX_CONNECTIONS} are open");
            return;
        }
        if let Some(id) = self.insert(Endpoint::new(socket), State::Greeting) {
            self.set_deadline(id, Some(now + self.timeouts.connect));
        }
    }

    /// Act on an event of a host socket.
    pub fn on_socket(&mut self, id: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.endpoint.on_events(events);
        if matches!(connection.state, State::Greeting) {
            self.greet(id);
            return;
        }
        let flushed = connection.endpoint.flush();
        if let State::Attached { stream, .. } = &mut connection.state {
            match flushed {
                Ok(bytes) => stream.forward(bytes),
                Err(Deaf) => {
                    connection.endpoint.drop_backlog();
                    stream.on_host_deaf();
                }
            }
        } else if flushed == Err(Deaf) {
            connection.endpoint.drop_backlog();
        }
        self.settle(id);
    }

    fn greet(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut line = [0; MAX_LINE_BYTES];
        let greeting = match connection.endpoint.peek(&mut line) {
            Received::Nothing => return,
            Received::Bytes(bytes) => greeting::parse(&line[..bytes]),
            Received::End => Greeting::Malformed,
        };
        match greeting {
            // A host that has ended its side can't finish the line.
            Greeting::Partial if !connection.endpoint.is_peer_ended() => {}
            Greeting::Connect { port, line_bytes } => {
                // The line is taken in any case: closing with it unread would be a reset to the dialler.
                // A guest without a driver will never answer: closed at once, so that the dialler can try again.
                if !connection.endpoint.skip(line_bytes) || !self.guest_ready {
                    self.remove(id);
                    return;
                }
                let key = self.unused_key(port);
                let stream = Stream::requested(self.window_bytes());
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.state = State::Attached { key, stream };
                    self.ids.insert(key, id);
                }
                self.settle(id);
            }
            Greeting::Malformed | Greeting::Partial => self.remove(id),
        }
    }

    fn unused_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.ids.contains_key(&key) {
                return key;
            }
        }
    }

    /// Act on every deadline that has passed.
    pub fn expire(&mut self, now: Instant) {
        while let Some((deadline, id)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.remove(&(deadline, id));
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.deadline = None;
            match &mut connection.state {
                State::Attached { stream, .. } if stream.awaits_response() || stream.is_closing() => {
                    self.reset(id)
                }
                State::Attached { stream, .. } if !stream.is_requested() => {
                    stream.on_stall();
                    self.settle(id);
                }
                _ => self.remove(id),
            }
        }
    }

    // ---- the guest's side ----

    /// A new kernel runs in the guest: it knows none of the connections.
    pub fn drop_guest(&mut self) {
        self.resets.clear();
        let known: Vec<u64> = self.ids.values().copied().collect();
        for id in known {
            self.detach(id);
        }
    }

    /// Act on a packet of the guest; `data` is what lies behind its header, `data_bytes` its length.
    pub fn on_packet(&mut self, header: &Header, data: &mut Vec<VolatileSlice<'_>>, data_bytes: usize) {
        self.counters.packets_in_total.add(1);
        if header.src_cid != self.guest_cid {
            self.counters.packets_dropped_total.add(1);
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let served = header.dst_cid == HOST_CID && header.socket_type == TYPE_STREAM;
        let id = if served { self.ids.get(&key).copied() } else { None };
        match (id, header.op) {
            (Some(id), _) if header.op == Op::Data && header.data_bytes as usize > data_bytes => {
                self.reset(id)
            }
            (Some(id), _) => self.on_known(id, header, data),
            (None, Op::Reset) => {}
            (None, Op::Request) if served => self.on_request(key, header),
            (None, _) => self.push_reset(header.reset_reply()),
        }
    }

    fn on_request(&mut self, key: Key, header: &Header) {
        let mut path = self.uds_path.clone().into_os_string();
        path.push(format!("_{}", key.host_port));
        let connected = if self.connections.len() < MAX_CONNECTIONS {
            connect_now(path.as_ref())
        } else {
            Err(io::Error::other(format!("{MAX_CONNECTIONS} connections are open")))
        };
        let id = match connected {
            Ok(socket) => {
                let stream = Stream::accepted(self.window_bytes(), header);
                self.insert(Endpoint::new(socket), State::Attached { key, stream })
            }
            Err(error) => {
                log::debug!("the guest's connection to host port {} is refused: {error}", key.host_port);
                None
            }
        };
        match id {
            Some(id) => self.settle(id),
            None => self.push_reset(header.reset_reply()),
        }
    }

    fn on_known(&mut self, id: u64, header: &Header, data: &mut Vec<VolatileSlice<'_>>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let State::Attached { key, stream } = &mut connection.state else { return };
        match stream.on_packet(header) {
            Verdict::Noted | Verdict::GuestShutdown => {}
            Verdict::Connected => {
                let line = format!("OK {}\n", key.host_port);
                if !connection.endpoint.write_line(&line) {
                    self.reset(id);
                    return;
                }
                self.set_deadline(id, None);
            }
            Verdict::Deliver(bytes) => {
                self.counters.bytes_in_total.add(bytes as u64);
                truncate(data, bytes);
                match connection.endpoint.send(data, bytes) {
                    Ok(taken) => stream.forward(taken),
                    Err(Deaf) => {
                        connection.endpoint.drop_backlog();
                        stream.on_host_deaf();
                    }
                }
            }
            Verdict::GuestReset => {
                self.counters.resets_total.add(1);
                self.detach(id);
                return;
            }
            Verdict::Violation => {
                log::debug!("vsock connection reset: the guest sent {:?} out of turn", header.op);
                self.reset(id);
                return;
            }
        }
        self.settle(id);
    }

    /// Use the guest's buffers: waiting resets first, then each connection in turn.
    pub fn fill(&mut self, ring: &mut Ring, memory: &Memory, now: Instant, turns: usize) -> Filled {
        for _ in 0..turns {
            if let Some(header) = self.resets.front() {
                let Some(buffer) = take_buffer(ring, memory) else { return Filled::Starved };
                buffer.put(ring, memory, header);
                self.counters.packets_out_total.add(1);
                self.resets.pop_front();
                continue;
            }
            let Some(id) = self.queue.front().copied() else { return Filled::Idle };
            if !self.serve(id, ring, memory, now) {
                return Filled::Starved;
            }
            self.queue.pop_front();
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.queued = false;
                self.settle(id);
            }
        }
        if self.has_output() { Filled::More } else { Filled::Idle }
    }

    /// One packet without data, or one batch of data. False when there was no buffer for it.
    fn serve(&mut self, id: u64, ring: &mut Ring, memory: &Memory, now: Instant) -> bool {
        let Some(Connection { state: State::Attached { key, .. }, .. }) = self.connections.get(&id) else {
            return true;
        };
        let mut header = self.header(*key, Op::Data);
        let Some(connection) = self.connections.get_mut(&id) else { return true };
        let State::Attached { stream, .. } = &mut connection.state else { return true };
        if stream.has_control() {
            let Some(buffer) = take_buffer(ring, memory) else { return false };
            if let Some((op, flags)) = stream.next_control() {
                (header.op, header.flags) = (op, flags);
            }
            (header.buf_alloc, header.fwd_cnt) = stream.credit_words();
            buffer.put(ring, memory, &header);
            stream.on_credit_told();
            self.counters.packets_out_total.add(1);
            if stream.is_closing() {
                self.set_deadline(id, Some(now + self.timeouts.close));
            }
            return true;
        }
        if !connection.endpoint.is_readable() {
            return true;
        }
        let limit_bytes = stream.sendable_bytes();
        if limit_bytes == 0 {
            return true;
        }
        (header.buf_alloc, header.fwd_cnt) = stream.credit_words();
        match connection.batch.receive(ring, memory, &mut connection.endpoint, &header, limit_bytes) {
            None => return false,
            Some((Received::Bytes(bytes), packets)) => {
                stream.send(bytes);
                stream.on_credit_told();
                self.counters.bytes_out_total.add(bytes as u64);
                self.counters.packets_out_total.add(packets);
            }
            Some((Received::End, _)) => {
                connection.endpoint.on_end();
                stream.on_host_end();
            }
            Some((Received::Nothing, _)) => {}
        }
        true
    }
}
