//! A client that waits on the caller's own thread.
//!
//! There is no reader thread: waking one costs more than the call. Of the threads that wait at once one leads: it polls the
//! socket, a wake-up event, the watched process and the nearest deadline, reads for all and wakes the others whose answers
//! came. When its own answer is there, another waiter leads. An event loop leads instead by calling
//! [`Client::on_readable`] when [`Client::socket`] is readable; the two ways are not mixed on one connection.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};

use crate::error::TtrpcError;
use crate::frame::{StreamId, StreamMap};
use crate::slots::{Answer, Call, ClientState};
use crate::wire::{receive, send_now, time_left};

/// Most reads in one go, so that a flood from the peer does not keep an event loop from its other work.
const MAX_READS_IN_ONE_GO: usize = 32;

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
        Ok(Self { epoll, socket, wake, _watch: watch, watches_writable: AtomicBool::new(false) })
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
        let now = Instant::now();
        let mut inner = self.lock();
        let (slot, prefix) = inner.state.open(call, now)?;
        let parts: [&[u8]; 2] = [&prefix, call.payload];
        if inner.state.kept_bytes() == 0 {
            inner.send(&parts);
        } else {
            inner.state.keep(&parts, 0);
            inner.flush();
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
        let (mut has_looked, mut is_interrupted) = (false, false);
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
                (inner, is_interrupted) = self.lead(inner, earlier(due, until));
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
    /// Sends these parts now and keeps the rest.
    fn send(&mut self, parts: &[&[u8]]) {
        let Some(descriptors) = self.descriptors.clone() else { return };
        match send_now(descriptors.socket.as_fd(), parts, 0) {
            Ok(sent) if sent == parts.iter().map(|part| part.len()).sum::<usize>() => {}
            Ok(sent) => self.state.keep(parts, sent),
            Err(Errno::EAGAIN) => self.state.keep(parts, 0),
            Err(errno) => self.send_failed(errno),
        }
    }

    fn flush(&mut self) {
        let Some(descriptors) = self.descriptors.clone() else { return };
        while self.state.kept_bytes() > 0 {
            match send_now(descriptors.socket.as_fd(), &[self.state.kept()], 0) {
                Ok(sent) => self.state.sent(sent),
                Err(Errno::EAGAIN) => return,
                Err(errno) => return self.send_failed(errno),
            }
        }
    }

    fn send_failed(&mut self, errno: Errno) {
        // The peer may have answered before it went.
        self.read_ready();
        self.break_with(&TtrpcError::io("send", errno));
    }

    /// Reads until the socket has nothing more.
    fn read_ready(&mut self) {
        let Some(descriptors) = self.descriptors.clone() else { return };
        for _ in 0..MAX_READS_IN_ONE_GO {
            if self.state.broken().is_some() {
                return;
            }
            let space = self.state.space();
            let space_bytes = space.len();
            match receive(descriptors.socket.as_fd(), space, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => {
                    self.break_with(&TtrpcError::Closed { reason: "the peer closed it".into() });
                    return;
                }
                Ok(bytes) => {
                    self.state.received(bytes, Instant::now());
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
