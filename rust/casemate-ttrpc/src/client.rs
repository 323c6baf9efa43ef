//! A client that waits on the caller's own thread.
//!
//! There is no reader thread: waking one costs more than the call. Of the threads that wait at once one leads: it polls the
//! socket, a wake-up event, the watched process and the nearest deadline, reads for all and wakes the others whose answers
//! came. When its own answer is there, another waiter leads. An event loop leads instead by calling
//! [`Client::on_readable`] when [`Client::socket`] is readable; the two ways are not mixed on one connection.
//!
//! Most answers come within a few microseconds. So a wait begins with a read that sleeps, for [`READ_FIRST`] at most, and
//! asks for readiness only when that was in vain: one system call less for each answer. Whatever else a leader has to see
//! to (another's nearer deadline, bytes that the socket did not take, the watched process's end without an end of the
//! stream) waits for that time.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use casemate_failpoint::{Failure, hit};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, Shutdown, setsockopt, shutdown, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::TtrpcError;
use crate::frame::{StreamId, StreamMap};
use crate::slots::{Answer, Call, ClientState, MIN_SPARE_BYTES, Piece};
use crate::wire::{MAX_PARTS, receive, receive_once, send_now, time_left};

/// Most reads in one go, so that a flood from the peer does not keep an event loop from its other work.
const MAX_READS_IN_ONE_GO: usize = 32;

/// Payloads up to this size are sent from one buffer with what stands before them.
const SMALL_BYTES: usize = 1 << 10;

/// Longest read that a wait begins with.
pub const READ_FIRST: Duration = Duration::from_millis(20);

/// How a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Waited {
    /// These slots have an answer, or are not open any more.
    Ready(Vec<StreamId>),
    /// The given time came.
    TimedOut,
    /// A signal interrupted the calling thread.
    Interrupted,
}

/// One connection, as client. Usable from several threads.
#[derive(Debug)]
pub struct Client {
    inner: Mutex<Inner>,
}

/// What a leader waits for. An epoll set, because its cost does not grow with what is watched besides the socket.
#[derive(Debug)]
struct Descriptors {
    epoll: Epoll,
    socket: OwnedFd,
    wake: EventFd,
    /// Held open for the set.
    _watch: Option<OwnedFd>,
    watches_writable: AtomicBool,
    /// Whether a plain read sleeps, for [`READ_FIRST`] at most.
    can_read_first: bool,
}

/// What an event is about.
const SOCKET: u64 = 0;
const WAKE: u64 = 1;
const WATCH: u64 = 2;

impl Descriptors {
    fn new(socket: OwnedFd, watch: Option<OwnedFd>) -> Result<Self, TtrpcError> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| TtrpcError::io("eventfd", errno))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| TtrpcError::io("epoll_create", errno))?;
        let add = |fd: BorrowedFd<'_>, which| {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, which);
            epoll.add(fd, event).map_err(|errno| TtrpcError::io("epoll_ctl", errno))
        };
        add(socket.as_fd(), SOCKET)?;
        add(wake.as_fd(), WAKE)?;
        if let Some(watch) = &watch {
            add(watch.as_fd(), WATCH)?;
        }
        let can_read_first = Self::limit_reads(&socket).unwrap_or(false);
        let watches_writable = AtomicBool::new(false);
        Ok(Self { epoll, socket, wake, _watch: watch, watches_writable, can_read_first })
    }

    /// Whether a plain read sleeps on this socket and for no longer than it may.
    fn limit_reads(socket: &OwnedFd) -> Result<bool, Errno> {
        let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
        let limit = TimeVal::milliseconds(i64::try_from(READ_FIRST.as_millis()).unwrap_or(1));
        setsockopt(socket, sockopt::ReceiveTimeout, &limit)?;
        Ok(!flags.contains(OFlag::O_NONBLOCK))
    }

    /// Called by the leader alone.
    fn watch_writable(&self, wanted: bool) -> Result<(), Errno> {
        if self.watches_writable.swap(wanted, Ordering::Relaxed) == wanted {
            return Ok(());
        }
        let mut interest = EpollFlags::EPOLLIN;
        interest.set(EpollFlags::EPOLLOUT, wanted);
        self.epoll.modify(&self.socket, &mut EpollEvent::new(interest, SOCKET))
    }
}

#[derive(Debug)]
struct Inner {
    state: ClientState,
    /// None after close: the descriptors themselves go when the thread that polls them is done.
    descriptors: Option<Arc<Descriptors>>,
    /// Whether a thread polls now, and until when it sleeps at most.
    leader: Option<Lead>,
    /// Whether the leader reads now and has the decoder: nobody else may read then.
    is_read: bool,
    followers: StreamMap<Vec<Arc<Condvar>>>,
}

#[derive(Clone, Copy, Debug)]
struct Lead {
    sleeps_until: Option<Instant>,
    polls_writable: bool,
}

impl Client {
    /// Owns the connected stream socket. Waits end when `watch` (a pidfd) becomes readable.
    ///
    /// # Errors
    /// [`TtrpcError::Io`] when there are no descriptors left.
    pub fn new(socket: OwnedFd, watch: Option<OwnedFd>) -> Result<Self, TtrpcError> {
        let inner = Inner {
            state: ClientState::new(),
            descriptors: Some(Arc::new(Descriptors::new(socket, watch)?)),
            leader: None,
            is_read: false,
            followers: StreamMap::default(),
        };
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// The socket's number, for an event loop; `None` after [`Client::close`].
    #[must_use]
    pub fn socket(&self) -> Option<RawFd> {
        self.lock().descriptors.as_ref().map(|descriptors| descriptors.socket.as_raw_fd())
    }

    /// Sends a request and returns its slot. Does not block: what the socket does not take is kept.
    ///
    /// # Errors
    /// As [`ClientState::open`]. A broken connection is reported by the slot, not here, when it breaks in this call.
    pub fn submit(&self, call: &Call<'_>) -> Result<StreamId, TtrpcError> {
        self.submit_kept(call, || Piece::new(call.payload.to_vec()))
    }

    /// As [`Client::submit`]; `own` gives the payload's owner, in case that not all of it can be sent at once.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn submit_kept(&self, call: &Call<'_>, own: impl FnOnce() -> Piece) -> Result<StreamId, TtrpcError> {
        let now = Instant::now();
        let mut inner = self.lock();
        let (slot, prefix) = inner.state.open(call, now)?;
        if let Err(failure) = inner.send(prefix, call.payload, own) {
            if failure.text.is_none() {
                inner.state.cancel(slot);
                return Err(failure.into());
            }
            inner.break_with(&failure.into());
        }
        if let Some(lead) = inner.leader {
            let is_due_earlier = call
                .timeout
                .and_then(|timeout| now.checked_add(timeout))
                .is_some_and(|due| lead.sleeps_until.is_none_or(|until| due < until));
            let must_watch_writable = inner.state.kept_bytes() > 0 && !lead.polls_writable;
            if is_due_earlier || must_watch_writable || inner.state.broken().is_some() {
                inner.wake_leader();
            }
        }
        inner.notify_finished();
        Ok(slot)
    }

    /// The answer of a finished slot, once; `None` while it is open.
    pub fn take(&self, slot: StreamId) -> Option<Answer> {
        self.lock().state.take(slot)
    }

    /// Takes the memory of an answer that is of no more use, for the next ones.
    pub fn recycle(&self, answer: Vec<u8>) {
        if answer.capacity() >= MIN_SPARE_BYTES {
            self.lock().state.recycle(answer);
        }
    }

    /// Waits until one of `slots` has an answer or is not open any more, at most until `until`. Blocks.
    ///
    /// No slots are ready at once. A time that is over already still takes in what has come.
    pub fn wait_ready(&self, slots: &[StreamId], until: Option<Instant>) -> Waited {
        if slots.is_empty() {
            return Waited::Ready(Vec::new());
        }
        let is_ready = |state: &mut ClientState| {
            let ready: Vec<StreamId> = slots.iter().copied().filter(|slot| state.is_ready(*slot)).collect();
            (!ready.is_empty()).then_some(ready)
        };
        self.wait_for(slots, until, is_ready).map_or_else(|why| why, Waited::Ready)
    }

    /// Waits for one slot and takes its answer, at most until `until`; `None` then, and when a signal came. Blocks.
    pub fn wait_until(&self, slot: StreamId, until: Option<Instant>) -> Option<Answer> {
        self.wait_for(&[slot], until, |state| state.take(slot)).ok()
    }

    /// Waits for one slot and takes its answer. Blocks, and goes on after signals.
    ///
    /// # Errors
    /// What the slot ended with.
    pub fn wait(&self, slot: StreamId) -> Answer {
        loop {
            if let Some(answer) = self.wait_until(slot, None) {
                return answer;
            }
        }
    }

    /// Leads or follows until `look` sees what it waits for in the table. An error is why it did not.
    fn wait_for<T>(
        &self,
        slots: &[StreamId],
        until: Option<Instant>,
        mut look: impl FnMut(&mut ClientState) -> Option<T>,
    ) -> Result<T, Waited> {
        let mut inner = self.lock();
        let (mut has_looked, mut has_read, mut is_interrupted) = (false, false, false);
        let result = loop {
            // Before the clock is asked: on the way out it is not needed.
            if let Some(found) = look(&mut inner.state) {
                break Ok(found);
            }
            if is_interrupted {
                break Err(Waited::Interrupted);
            }
            let now = Instant::now();
            let due = inner.state.expire(now);
            if inner.notify_all_finished() {
                continue;
            }
            if until.is_some_and(|until| until <= now) {
                if has_looked || inner.leader.is_some() {
                    break Err(Waited::TimedOut);
                }
                inner.read_ready();
                has_looked = true;
            } else if inner.leader.is_some() {
                inner = Self::follow(inner, slots, until);
            } else {
                let until = earlier(due, until);
                let has_time = until.is_none_or(|until| until.saturating_duration_since(now) > READ_FIRST);
                let reads_first = has_time && !has_read;
                has_read = true;
                (inner, is_interrupted) =
                    if reads_first { self.lead_reading(inner, until) } else { self.lead(inner, until) };
            }
        };
        inner.notify_all_finished();
        inner.hand_over();
        result
    }

    /// Forgets the slot. A thread that waits for it gets [`TtrpcError::UnknownSlot`].
    pub fn cancel(&self, slot: StreamId) {
        let mut inner = self.lock();
        if inner.state.cancel(slot) {
            inner.notify(slot);
            inner.wake_leader();
        }
    }

    /// Reads what is there and returns the slots that finished, also by their deadlines, with their answers. Does not block.
    pub fn on_readable(&self) -> Vec<(StreamId, Answer)> {
        let mut inner = self.lock();
        inner.read_ready();
        inner.state.expire(Instant::now());
        let finished: Vec<StreamId> = inner.state.take_finished().collect();
        finished.into_iter().filter_map(|slot| inner.state.take(slot).map(|answer| (slot, answer))).collect()
    }

    /// Sends what is kept. Does not block.
    pub fn on_writable(&self) {
        let mut inner = self.lock();
        inner.flush();
        inner.notify_finished();
    }

    /// Breaks the connection with this error; returns the slots that were open. They keep the error until it is taken.
    pub fn fail(&self, error: &TtrpcError) -> Vec<StreamId> {
        let mut inner = self.lock();
        let open = inner.break_with(error);
        inner.notify_finished();
        inner.wake_leader();
        open
    }

    /// Breaks the connection and gives its descriptors back. Idempotent.
    pub fn close(&self) {
        self.fail(&TtrpcError::Closed { reason: "closed by its owner".into() });
        self.lock().descriptors = None;
    }

    /// Whether bytes are kept that the socket did not take.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.lock().state.kept_bytes() > 0
    }

    /// Why the connection is over, `None` while it is not.
    #[must_use]
    pub fn broken(&self) -> Option<TtrpcError> {
        self.lock().state.broken().cloned()
    }

    /// Answers that came for slots already forgotten.
    #[must_use]
    pub fn dropped_answers_total(&self) -> u64 {
        self.lock().state.dropped_answers_total()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until another thread has news about one of `slots`, or this one shall lead.
    fn follow<'a>(
        mut inner: MutexGuard<'a, Inner>,
        slots: &[StreamId],
        until: Option<Instant>,
    ) -> MutexGuard<'a, Inner> {
        let news = Arc::new(Condvar::new());
        for slot in slots {
            inner.followers.entry(*slot).or_default().push(Arc::clone(&news));
        }
        inner = match until {
            None => news.wait(inner).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                news.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0
            }
        };
        for slot in slots {
            if let Some(waiting) = inner.followers.get_mut(slot) {
                waiting.retain(|other| !Arc::ptr_eq(other, &news));
                if waiting.is_empty() {
                    inner.followers.remove(slot);
                }
            }
        }
        inner
    }

    /// Sleeps in a read, for [`READ_FIRST`] at most, and takes in what came; true when a signal ended it.
    fn lead_reading<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        until: Option<Instant>,
    ) -> (MutexGuard<'a, Inner>, bool) {
        let Some(descriptors) = inner.descriptors.clone() else { return (inner, false) };
        if !descriptors.can_read_first || inner.state.kept_bytes() > 0 || inner.state.broken().is_some() {
            return self.lead(inner, until);
        }
        if let Err(failure) = hit("native.recv") {
            inner.break_with(&failure.into());
            return (inner, false);
        }
        let mut decoder = inner.state.lend_decoder();
        inner.leader = Some(Lead { sleeps_until: until, polls_writable: false });
        inner.is_read = true;
        drop(inner);

        let space = decoder.space();
        let space_bytes = space.len();
        let result = receive_once(descriptors.socket.as_fd(), space, MsgFlags::empty());

        let mut inner = self.lock();
        inner.leader = None;
        inner.is_read = false;
        inner.state.take_back_decoder(decoder);
        if inner.state.broken().is_some() {
            return (inner, false);
        }
        match result {
            Ok(bytes) => {
                inner.take_in(bytes);
                if bytes == space_bytes {
                    inner.read_ready();
                }
            }
            // The time is over; what was left to do meanwhile is seen to by a poll.
            Err(Errno::EAGAIN) => {}
            Err(Errno::EINTR) => return (inner, true),
            Err(errno) => {
                inner.break_with(&TtrpcError::io("recv", errno));
            }
        }
        (inner, false)
    }

    /// Polls once for everybody and takes in what came; true when a signal ended the poll.
    fn lead<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        until: Option<Instant>,
    ) -> (MutexGuard<'a, Inner>, bool) {
        let Some(descriptors) = inner.descriptors.clone() else {
            // Closed: every slot has finished, so the caller's loop ends at its next look.
            return (inner, false);
        };
        let polls_writable = inner.state.kept_bytes() > 0;
        if let Err(errno) = descriptors.watch_writable(polls_writable) {
            inner.break_with(&TtrpcError::io("epoll_ctl", errno));
            return (inner, false);
        }
        inner.leader = Some(Lead { sleeps_until: until, polls_writable });
        drop(inner);

        let mut events = [EpollEvent::empty(); 3];
        let result = descriptors.epoll.wait(&mut events, epoll_timeout(until));
        let flags_of = |which: u64| {
            let events = events.iter().take(result.unwrap_or(0));
            events
                .filter(|event| event.data() == which)
                .fold(EpollFlags::empty(), |all, event| all | event.events())
        };
        let (socket, woken, watch_ended) =
            (flags_of(SOCKET), !flags_of(WAKE).is_empty(), !flags_of(WATCH).is_empty());

        let mut inner = self.lock();
        inner.leader = None;
        match result {
            Ok(0) => {}
            Ok(_) => {
                if woken && let Err(errno) = descriptors.wake.read() {
                    log::debug!("wake-up event: {errno}");
                }
                if socket.contains(EpollFlags::EPOLLOUT) {
                    inner.flush();
                }
                if !socket.is_empty() {
                    inner.read_ready();
                }
                if watch_ended {
                    // Answers that were sent before the end count.
                    inner.read_ready();
                    let reason = "the process that serves it has ended".into();
                    inner.break_with(&TtrpcError::Closed { reason });
                }
            }
            Err(Errno::EINTR) => return (inner, true),
            Err(errno) => {
                inner.break_with(&TtrpcError::io("epoll_wait", errno));
            }
        }
        (inner, false)
    }
}

fn epoll_timeout(until: Option<Instant>) -> EpollTimeout {
    until.map_or(EpollTimeout::NONE, |until| {
        EpollTimeout::try_from(time_left(until)).unwrap_or(EpollTimeout::MAX)
    })
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

impl Inner {
    /// Sends both parts behind what is kept, as far as the socket takes them, and keeps the rest.
    fn send(
        &mut self,
        mut prefix: Vec<u8>,
        payload: &[u8],
        own: impl FnOnce() -> Piece,
    ) -> Result<(), Failure> {
        hit("native.send")?;
        let Some(descriptors) = self.descriptors.clone() else { return Ok(()) };
        let is_first = self.state.kept_bytes() == 0;
        // One buffer costs the kernel less than two, if the copy is small.
        let is_small = payload.len() <= SMALL_BYTES;
        prefix.extend_from_slice(if is_small { payload } else { &[] });
        let payload: &[u8] = if is_small { &[] } else { payload };
        let mut sent = 0;
        if is_first {
            match send_now(descriptors.socket.as_fd(), &[&prefix, payload], 0) {
                Ok(bytes) => sent = bytes,
                Err(Errno::EAGAIN) => {}
                Err(errno) => {
                    self.send_failed(errno);
                    return Ok(());
                }
            }
        }
        let prefix_bytes = prefix.len();
        if sent < prefix_bytes {
            self.state.keep(Piece::new(prefix), sent);
        }
        // A small payload stands in the prefix: it must not be kept a second time.
        if !is_small && sent < prefix_bytes + payload.len() {
            self.state.keep(own(), sent.saturating_sub(prefix_bytes));
        }
        if !is_first {
            self.flush();
        }
        Ok(())
    }

    fn flush(&mut self) {
        let Some(descriptors) = self.descriptors.clone() else { return };
        while self.state.kept_bytes() > 0 {
            let mut parts: [&[u8]; MAX_PARTS] = [&[]; MAX_PARTS];
            let mut count = 0;
            for (part, kept) in parts.iter_mut().zip(self.state.kept()) {
                *part = kept;
                count += 1;
            }
            match send_now(descriptors.socket.as_fd(), &parts[..count], 0) {
                Ok(sent) => self.state.sent(sent),
                Err(Errno::EAGAIN) => return,
                Err(errno) => return self.send_failed(errno),
            }
        }
    }

    fn send_failed(&mut self, errno: Errno) {
        if self.is_read && matches!(errno, Errno::EPIPE | Errno::ECONNRESET) {
            // The leader's read finds the answers that came before the end, then the end.
            return;
        }
        // The peer may have answered before it went.
        self.read_ready();
        self.break_with(&TtrpcError::io("send", errno));
    }

    /// Takes in bytes that were read into the decoder; 0 is the end of the stream.
    fn take_in(&mut self, bytes: usize) {
        if bytes == 0 {
            self.break_with(&TtrpcError::Closed { reason: "the peer closed it".into() });
        } else {
            self.state.received(bytes, Instant::now());
        }
    }

    /// Reads until the socket has nothing more.
    fn read_ready(&mut self) {
        let Some(descriptors) = self.descriptors.clone() else { return };
        if self.is_read {
            return;
        }
        for _ in 0..MAX_READS_IN_ONE_GO {
            if self.state.broken().is_some() {
                return;
            }
            if let Err(failure) = hit("native.recv") {
                self.break_with(&failure.into());
                return;
            }
            let space = self.state.space();
            let space_bytes = space.len();
            match receive(descriptors.socket.as_fd(), space, MsgFlags::MSG_DONTWAIT) {
                Ok(bytes) => {
                    self.take_in(bytes);
                    if bytes < space_bytes {
                        return;
                    }
                }
                Err(Errno::EAGAIN) => return,
                Err(errno) => {
                    self.break_with(&TtrpcError::io("recv", errno));
                    return;
                }
            }
        }
    }

    fn break_with(&mut self, error: &TtrpcError) -> Vec<StreamId> {
        let open = self.state.break_with(error);
        if let Some(descriptors) = &self.descriptors
            && let Err(errno) = shutdown(descriptors.socket.as_raw_fd(), Shutdown::Both)
        {
            log::debug!("shutdown of the connection: {errno}");
        }
        open
    }

    /// Ends the poll of the thread that leads, if one does.
    fn wake_leader(&self) {
        let (Some(_), Some(descriptors)) = (self.leader, &self.descriptors) else { return };
        match descriptors.wake.write(1) {
            // Full means that the leader has been told already.
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(errno) => log::error!("the wake-up event could not be set: {errno}"),
        }
    }

    fn notify(&self, slot: StreamId) {
        for news in self.followers.get(&slot).into_iter().flatten() {
            news.notify_one();
        }
    }

    /// Wakes the followers of the slots that finished. Without anybody who waits, the list is left for `on_readable`.
    fn notify_finished(&mut self) {
        if self.followers.is_empty() && self.leader.is_none() {
            return;
        }
        self.notify_all_finished();
    }

    /// Wakes the followers of the slots that finished; whether there were any.
    fn notify_all_finished(&mut self) -> bool {
        let mut any = false;
        for slot in self.state.take_finished() {
            any = true;
            for news in self.followers.get(&slot).into_iter().flatten() {
                news.notify_one();
            }
        }
        any
    }

    /// Wakes one follower to lead, when nobody does.
    fn hand_over(&self) {
        if self.leader.is_none()
            && let Some(news) = self.followers.values().flatten().next()
        {
            news.notify_one();
        }
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
