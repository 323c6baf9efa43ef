//! One connection's waiting for streams, on one thread.
//!
//! An answer is written by the thread that gives it, which blocks while the caller does not read. So each connection has
//! its own pump: a caller that stops reading holds up nobody else. The thread starts with the first wait.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Context, Result};

/// Something that waits for a descriptor.
pub trait Source: Send + Sync {
    /// The descriptor is ready or the deadline has come. Calls [`Pump::unwatch`] when nothing is waited for any more.
    fn on_ready(self: Arc<Self>);
    /// The pump has ended: whatever waited through it is dropped.
    fn on_pump_ended(self: Arc<Self>, pump: &Pump);
}

type Task = Box<dyn FnOnce() + Send>;

struct Watch {
    source: Arc<dyn Source>,
    deadline: Option<Instant>,
}

#[derive(Default)]
struct State {
    watches: HashMap<u64, Watch>,
    tasks: Vec<Task>,
}

/// See the module.
pub struct Pump {
    epoll: Epoll,
    wake: EventFd,
    state: Mutex<State>,
    started: Once,
    ended: AtomicBool,
}

impl std::fmt::Debug for Pump {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pump").finish_non_exhaustive()
    }
}

const WAKE: u64 = 0;

/// A number for a source, unique in this process.
pub fn next_source_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(WAKE + 1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Pump {
    /// A pump that watches nothing and has no thread yet.
    pub fn new() -> Result<Arc<Self>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll", "pump")?;
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .context("eventfd", "pump")?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE)).context("epoll add", "pump")?;
        Ok(Arc::new(Self {
            epoll,
            wake,
            state: Mutex::new(State::default()),
            started: Once::new(),
            ended: AtomicBool::new(false),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(self: &Arc<Self>) {
        self.started.call_once(|| {
            let pump = Arc::clone(self);
            if let Err(error) = std::thread::Builder::new().name("pump".to_owned()).spawn(move || pump.run())
            {
                log::error!("pump thread: {error}");
            }
        });
    }

    fn wake(&self) {
        if let Err(errno) = self.wake.write(1) {
            log::error!("pump can't be woken: {errno}");
        }
    }

    /// Call `source` when `fd` is ready, until [`Pump::unwatch`].
    pub fn watch(
        self: &Arc<Self>,
        id: u64,
        fd: BorrowedFd<'_>,
        source: Arc<dyn Source>,
        interest: EpollFlags,
        deadline: Option<Instant>,
    ) -> Result<()> {
        self.start();
        let added = {
            let mut state = self.lock();
            let added = self.epoll.add(fd, EpollEvent::new(interest, id));
            if added.is_ok() {
                state.watches.insert(id, Watch { source, deadline });
            }
            added
        };
        if deadline.is_some() {
            self.wake();
        }
        added.context("epoll add", "stream")
    }

    /// Watch no more.
    pub fn unwatch(&self, id: u64, fd: BorrowedFd<'_>) {
        let watch = self.lock().watches.remove(&id);
        if watch.is_some()
            && let Err(errno) = self.epoll.delete(fd)
        {
            log::warn!("epoll delete: {errno}");
        }
    }

    /// Have the source called at `deadline` even when nothing comes.
    pub fn set_deadline(&self, id: u64, deadline: Instant) {
        if let Some(watch) = self.lock().watches.get_mut(&id) {
            watch.deadline = Some(deadline);
        }
        self.wake();
    }

    /// Run `task` on the pump's thread. Dropped when the connection is over.
    pub fn post(self: &Arc<Self>, task: impl FnOnce() + Send + 'static) {
        self.start();
        if !self.ended.load(Ordering::Acquire) {
            self.lock().tasks.push(Box::new(task));
            self.wake();
        }
    }

    /// The connection is over: end the thread, let go of everything watched.
    pub fn end(self: &Arc<Self>) {
        self.ended.store(true, Ordering::Release);
        self.wake();
        self.start();
    }

    fn run(&self) {
        let mut events = [EpollEvent::empty(); 32];
        while !self.ended.load(Ordering::Acquire) {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => {
                    log::error!("pump ended: {errno}");
                    break;
                }
            };
            for event in &events[..count] {
                if event.data() == WAKE {
                    // Nothing to read means that an earlier round has read it.
                    let _count = self.wake.read();
                } else {
                    let source =
                        self.lock().watches.get(&event.data()).map(|watch| Arc::clone(&watch.source));
                    if let Some(source) = source {
                        source.on_ready();
                    }
                }
            }
            let tasks = std::mem::take(&mut self.lock().tasks);
            for task in tasks {
                task();
            }
            for source in self.take_due() {
                source.on_ready();
            }
        }
        self.ended.store(true, Ordering::Release);
        let State { watches, tasks } = std::mem::take(&mut *self.lock());
        drop(tasks);
        for watch in watches.into_values() {
            watch.source.on_pump_ended(self);
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let next = self.lock().watches.values().filter_map(|watch| watch.deadline).min();
        let Some(next) = next else { return EpollTimeout::NONE };
        let ms = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        EpollTimeout::try_from(ms).unwrap_or(EpollTimeout::MAX)
    }

    fn take_due(&self) -> Vec<Arc<dyn Source>> {
        let now = Instant::now();
        let mut due = Vec::new();
        for watch in self.lock().watches.values_mut() {
            if watch.deadline.is_some_and(|deadline| deadline <= now) {
                watch.deadline = None;
                due.push(Arc::clone(&watch.source));
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn test_post_when_pump_runs_then_task_is_run_and_after_the_end_dropped() {
        let pump = Pump::new().expect("made");
        let (sender, receiver) = mpsc::channel();
        let second = sender.clone();
        pump.post(move || sender.send(1).expect("received"));
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(1));
        pump.end();
        pump.post(move || second.send(2).expect("received"));
        assert!(receiver.recv_timeout(Duration::from_secs(10)).is_err());
    }
}
