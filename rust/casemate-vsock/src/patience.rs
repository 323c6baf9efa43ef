//! How long to try, and what ends trying early.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::VsockError;

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

/// What a signal asks for: true ends the wait with `EINTR`.
pub type Interrupted<'a> = &'a dyn Fn() -> bool;

/// The bounds of one attempt to connect.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    /// Time for everything.
    pub timeout: Duration,
    /// A pidfd; when it becomes readable the attempt ends.
    pub watch: Option<BorrowedFd<'a>>,
    /// Asked at least every 100 ms and after each signal; true ends the attempt with `EINTR`.
    pub is_interrupted: Interrupted<'a>,
}

const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What ended a wait for readiness.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// The descriptor is ready.
    Yes,
    /// The time given for this wait is over, but not the whole time.
    NotYet,
}

/// A running attempt.
pub(crate) struct Attempt<'a> {
    patience: Patience<'a>,
    target: String,
    until: Option<Instant>,
    pause: Duration,
    pub(crate) last: Option<String>,
}

impl<'a> Attempt<'a> {
    pub(crate) fn new(patience: Patience<'a>, target: String) -> Self {
        let until = Instant::now().checked_add(patience.timeout);
        Self { patience, target, until, pause: FIRST_PAUSE, last: None }
    }

    pub(crate) fn io(&self, op: &'static str, errno: Errno) -> VsockError {
        VsockError::Io { op, target: self.target.clone(), errno }
    }

    /// Sleeps before another try: 1 ms at first, growing to 5.
    pub(crate) fn pause(&mut self, why: impl Into<String>) -> Result<(), VsockError> {
        self.last = Some(why.into());
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        self.wait(None, Some(pause)).map(|_| ())
    }

    /// Waits until `fd` is ready for `interest`, at most `limit`; fails when the whole attempt's time is over.
    pub(crate) fn wait(
        &self,
        fd: Option<(BorrowedFd<'_>, PollFlags)>,
        limit: Option<Duration>,
    ) -> Result<Ready, VsockError> {
        let soon = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            let now = Instant::now();
            if self.until.is_some_and(|until| until <= now) {
                return Err(VsockError::DeadlineExceeded {
                    target: self.target.clone(),
                    timeout: self.patience.timeout,
                    last: self.last.clone(),
                });
            }
            if soon.is_some_and(|soon| soon <= now) {
                return Ok(Ready::NotYet);
            }
            let look = now + LOOK_EVERY;
            let until = [self.until, soon, Some(look)].into_iter().flatten().min().unwrap_or(look);
            let left =
                PollTimeout::try_from(until - now + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
            let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(2);
            fds.extend(self.patience.watch.map(|watch| PollFd::new(watch, PollFlags::POLLIN)));
            fds.extend(fd.map(|(fd, interest)| PollFd::new(fd, interest)));
            match poll(&mut fds, left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.io("poll", errno)),
            }
            let is_ready = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or(false);
            let mut polled = fds.iter();
            let watch_ended = self.patience.watch.is_some() && is_ready(polled.next());
            // A connection that came just before the end is still of use: its answers count.
            if is_ready(polled.next()) {
                return Ok(Ready::Yes);
            }
            if watch_ended {
                return Err(VsockError::WatchEnded { target: self.target.clone() });
            }
            if (self.patience.is_interrupted)() {
                return Err(self.io("poll", Errno::EINTR));
            }
        }
    }
}
