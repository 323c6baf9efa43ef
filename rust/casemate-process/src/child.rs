//! What others see of a child.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::ProcessError;
use crate::tail::Tail;

/// The status of a child that somebody else reaped (a `waitpid(-1)`, an ignored SIGCHLD).
pub const UNKNOWN_STATUS: i32 = 255;

/// A process made by [`spawn`](crate::spawn). Dropping it neither ends the process nor leaves a zombie.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    start_time_ticks: u64,
    pidfd: OwnedFd,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) status: Option<i32>,
    pub(crate) stderr: Tail,
    pub(crate) console: Tail,
}

impl Child {
    pub(crate) fn new(pid: i32, start_time_ticks: u64, pidfd: OwnedFd) -> Self {
        Self { pid, start_time_ticks, pidfd, state: Mutex::default(), ended: Condvar::new() }
    }

    /// Process id. Belongs to this process until [`Child::exit_status`] is there.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Field 22 of `/proc/<pid>/stat`: clock ticks from the host's boot to the process's start.
    #[must_use]
    pub fn start_time_ticks(&self) -> u64 {
        self.start_time_ticks
    }

    /// Exit status, negative for a signal, `None` while it runs.
    #[must_use]
    pub fn exit_status(&self) -> Option<i32> {
        self.lock().status
    }

    /// At most the last [`TAIL_BYTES`](crate::TAIL_BYTES) of its stderr.
    #[must_use]
    pub fn stderr_tail(&self) -> Vec<u8> {
        self.lock().stderr.to_vec()
    }

    /// At most the last [`TAIL_BYTES`](crate::TAIL_BYTES) of its console.
    #[must_use]
    pub fn console_tail(&self) -> Vec<u8> {
        self.lock().console.to_vec()
    }

    /// What is kept of the console's output behind its first `position` bytes, and how many bytes came so far.
    #[must_use]
    pub fn console_since(&self, position: u64) -> (Vec<u8>, u64) {
        self.lock().console.since(position)
    }

    /// Waits for its end, and until stderr and console have been read, at most `timeout`; returns the exit status.
    ///
    /// Blocks on a lock, so signals don't end it: wait in slices to look for them.
    ///
    /// # Errors
    /// [`ProcessError::DeadlineExceeded`].
    pub fn wait(&self, timeout: Duration) -> Result<i32, ProcessError> {
        let until = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        loop {
            if let Some(status) = state.status {
                return Ok(status);
            }
            state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => {
                    return Err(ProcessError::DeadlineExceeded { pid: self.pid, timeout });
                }
                Some(left) => self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.ended.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Sends a signal; false when it has ended already.
    ///
    /// # Errors
    /// [`ProcessError::Io`] for a signal that does not exist.
    pub fn send_signal(&self, signal: i32) -> Result<bool, ProcessError> {
        // SAFETY: the descriptor is open as long as self; a null siginfo asks for the default one; no memory is passed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(result) {
            Ok(_) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(ProcessError::io("pidfd_send_signal", errno)),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_ended(&self, status: i32) {
        self.lock().status = Some(status);
        self.ended.notify_all();
    }
}

impl AsFd for Child {
    /// The pidfd: readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}
