//! The thread of a backend: one epoll loop that owns the device and all connections.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::{Direction, gather, take_header};
use crate::device::{Device, RX, TX};
use crate::error::VhostVsockError;
use crate::mux::{Filled, Mux, Timeouts};
use crate::stats::Counters;
use crate::unix::PrivateListener;

const STOP: u64 = 0;
const VHOST: u64 = 1;
const LISTENER: u64 = 2;
const FIRST_KICK: u64 = 3;
const FIRST_CONNECTION: u64 = 16;

/// Events taken by one `epoll_wait`.
const EVENTS: usize = 64;
/// Packets of the guest handled in one turn.
const PACKETS_A_TURN: usize = 256;
/// Packets or batches sent to the guest in one turn: what a connection may wait for that has just become ready.
const SENDS_A_TURN: usize = 8;
/// Host connections accepted in one turn.
const ACCEPTS_A_TURN: usize = 64;
/// Rest of the listener when there is no descriptor or memory for another socket.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for the rest of a vhost-user message.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a backend ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// The VMM closed its end.
    VmmClosed,
    /// Something broke.
    Failed(String),
}

/// What the thread owns.
pub struct Server {
    epoll: Arc<Epoll>,
    stop: EventFd,
    vhost: BackendReqHandler<Mutex<Device>>,
    device: Arc<Mutex<Device>>,
    listener: PrivateListener,
    accept_again: Option<Instant>,
    mux: Mux,
    counters: Arc<Counters>,
    packets_waiting: bool,
    starved: bool,
}

impl Server {
    /// Prepare everything that can fail.
    pub fn new(
        vhost: UnixStream,
        uds_path: &Path,
        guest_cid: u32,
        stop: EventFd,
        counters: Arc<Counters>,
        timeouts: Timeouts,
    ) -> Result<Self, VhostVsockError> {
        let on_vhost = |source| VhostVsockError::system("set up", "the vhost-user socket", source);
        vhost.set_nonblocking(false).map_err(on_vhost)?;
        vhost.set_read_timeout(Some(MESSAGE_TIMEOUT)).map_err(on_vhost)?;
        vhost.set_write_timeout(Some(MESSAGE_TIMEOUT)).map_err(on_vhost)?;
        let on_epoll = |source| VhostVsockError::system("watch", "epoll", source);
        let epoll = Arc::new(Epoll::new().map_err(on_epoll)?);
        let device = Device::new(guest_cid, Arc::clone(&epoll), FIRST_KICK).map_err(VhostVsockError::Ring)?;
        let device = Arc::new(Mutex::new(device));
        let listener = PrivateListener::bind(uds_path)
            .map_err(|source| VhostVsockError::system("listen on", uds_path.to_string_lossy(), source))?;
        for (fd, token) in
            [(stop.as_raw_fd(), STOP), (vhost.as_raw_fd(), VHOST), (listener.socket().as_raw_fd(), LISTENER)]
        {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).map_err(on_epoll)?;
        }
        let mux = Mux::new(
            guest_cid,
            uds_path.to_owned(),
            Arc::clone(&epoll),
            FIRST_CONNECTION,
            Arc::clone(&counters),
            timeouts,
        );
        Ok(Self {
            epoll,
            stop,
            vhost: BackendReqHandler::from_stream(vhost, Arc::clone(&device)),
            device,
            listener,
            accept_again: None,
            mux,
            counters,
            packets_waiting: false,
            starved: false,
        })
    }

    /// Serve until told to stop, the VMM is gone, or something breaks.
    pub fn run(&mut self) -> End {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let count = match self.epoll.wait(self.wait_ms(Instant::now()), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return End::Failed(format!("epoll_wait: {error}")),
            };
            let now = Instant::now();
            for event in &events[..count] {
                if let Some(end) = self.on_event(event, now) {
                    return end;
                }
            }
            self.mux.expire(now);
            if self.accept_again.is_some_and(|again| again <= now)
                && let Err(error) = self.watch_listener(true)
            {
                return End::Failed(format!("the listener can't be watched: {error}"));
            }
            self.turn(now);
        }
    }

    /// Milliseconds to sleep: none with work at hand, else until the next deadline.
    fn wait_ms(&self, now: Instant) -> i32 {
        let packets = self.packets_waiting && self.mux.takes_packets();
        if packets || self.mux.has_output() && !self.starved {
            return 0;
        }
        let deadline = [self.mux.next_deadline(), self.accept_again].into_iter().flatten().min();
        deadline.map_or(-1, |deadline| {
            // Rounded up: waking just before a deadline would mean to spin until it.
            let wait = deadline.saturating_duration_since(now) + Duration::from_micros(999);
            i32::try_from(wait.as_millis()).unwrap_or(i32::MAX)
        })
    }

    fn on_event(&mut self, event: &EpollEvent, now: Instant) -> Option<End> {
        const RX_KICK: u64 = FIRST_KICK + RX as u64;
        const TX_KICK: u64 = FIRST_KICK + TX as u64;
        match event.data() {
            STOP => {
                // Read only to be tidy: the thread ends with it.
                let _ = self.stop.read();
                return Some(End::Stopped);
            }
            VHOST => return self.on_request(),
            LISTENER => return self.accept(now),
            RX_KICK => self.starved = false,
            TX_KICK => self.packets_waiting = true,
            id if id >= FIRST_CONNECTION => self.mux.on_socket(id, event.event_set()),
            _ => {}
        }
        None
    }

    fn on_request(&mut self) -> Option<End> {
        match self.vhost.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_)) => {
                return Some(End::VmmClosed);
            }
            Err(error) => return Some(End::Failed(format!("vhost-user request: {error}"))),
        }
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if device.take_guest_replaced() {
            self.mux.drop_guest();
        }
        if device.take_rings_changed() {
            self.mux.set_guest_ready(device.is_running());
            // Packets and buffers may have come while nobody looked.
            self.packets_waiting = true;
            self.starved = false;
        }
        None
    }

    fn accept(&mut self, now: Instant) -> Option<End> {
        for _ in 0..ACCEPTS_A_TURN {
            match self.listener.socket().accept() {
                Ok((socket, _)) => {
                    if let Err(error) = socket.set_nonblocking(true) {
                        log::warn!("a vsock connection can't be served: {error}");
                        continue;
                    }
                    self.mux.on_accept(socket, now);
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => break,
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        log::warn!("vsock connections wait: {error}");
                        self.accept_again = Some(now + ACCEPT_PAUSE);
                        return self
                            .watch_listener(false)
                            .err()
                            .map(|error| End::Failed(format!("the listener can't be paused: {error}")));
                    }
                    _ => return Some(End::Failed(format!("accept: {error}"))),
                },
            }
        }
        None
    }

    fn watch_listener(&mut self, watch: bool) -> io::Result<()> {
        let events = if watch { EventSet::IN } else { EventSet::empty() };
        if watch {
            self.accept_again = None;
        }
        let fd = self.listener.socket().as_raw_fd();
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, LISTENER))
    }

    /// One round of work on the rings.
    fn turn(&mut self, now: Instant) {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if !device.is_running() {
            self.packets_waiting = false;
            self.starved = true;
            return;
        }
        let memory = device.memory();
        let (rx, tx) = device.packet_rings();
        if self.packets_waiting {
            tx.refuse_kicks(&memory);
            let mut segments: Vec<VolatileSlice<'_>> = Vec::new();
            let mut empty = false;
            for _ in 0..PACKETS_A_TURN {
                if !self.mux.takes_packets() {
                    break;
                }
                let Some(chain) = tx.pop(&memory) else {
                    empty = true;
                    break;
                };
                let head = chain.head_index();
                match gather(&memory, chain, Direction::FromGuest, &mut segments) {
                    Ok(bytes) => {
                        let header = take_header(&mut segments);
                        self.mux.on_packet(&header, &mut segments, bytes - crate::packet::HEADER_BYTES);
                    }
                    Err(error) => {
                        log::debug!("a packet of the guest can't be read: {error:?}");
                        self.counters.packets_dropped_total.add(1);
                    }
                }
                tx.push_used(&memory, head, 0);
            }
            if empty {
                self.packets_waiting = tx.ask_for_kick(&memory);
            }
            tx.signal(&memory);
        }
        if self.mux.has_output() && !self.starved {
            rx.refuse_kicks(&memory);
            if self.mux.fill(rx, &memory, now, SENDS_A_TURN) == Filled::Starved {
                self.starved = !rx.ask_for_kick(&memory);
            }
            rx.signal(&memory);
        }
        if !(rx.is_running() && tx.is_running()) {
            // A ring broke in this turn.
            self.mux.set_guest_ready(false);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A forked child may hold a duplicate: closing alone would not tell the VMM.
        if let Ok(socket) = self.vhost.try_clone_connection() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}
