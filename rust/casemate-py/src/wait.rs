//! Waits that Ctrl-C ends, time limits as Python gives them, and handles that don't survive a fork.

use std::cell::Cell;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use pyo3::prelude::*;

use crate::error::Error;

/// Longest sleep of the main thread without a look at pending signals.
const SLICE: Duration = Duration::from_millis(100);

/// Longer limits are as good as none.
const ENDLESS_S: f64 = 1e9;

/// Counts the forks between the first process and this one; a system call for every look would cost more than the look.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Counts forks from here on; called once, when the module is made.
pub fn count_forks() -> Result<(), Error> {
    extern "C" fn count() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler only adds to an atomic, which is all that may be done in a forked process with threads. It stays
    // mapped: Python never unloads extension modules.
    let errno = unsafe { libc::pthread_atfork(None, None, Some(count)) };
    if errno == 0 { Ok(()) } else { Err(Error::host("forks can't be watched", errno, "pthread_atfork")) }
}

/// Whether signals are handled on this thread: Python does so on the main thread only.
pub fn handles_signals() -> bool {
    thread_local! {
        static IS_MAIN: Cell<Option<(u32, bool)>> = const { Cell::new(None) };
    }
    let forks = FORKS.load(Ordering::Relaxed);
    if let Some((known, is_main)) = IS_MAIN.get()
        && known == forks
    {
        return is_main;
    }
    let is_main = nix::unistd::gettid() == nix::unistd::getpid();
    IS_MAIN.set(Some((forks, is_main)));
    is_main
}

/// Runs `step` without the interpreter until it has a result, looking for signals in between.
///
/// `step` gets the time at which it must return at the latest (`None`: never) and returns `None` when there is no result
/// yet; it is called again then, also after `until`, so it decides what the end of the time means.
pub fn in_slices<T: Send>(
    py: Python<'_>,
    until: Option<Instant>,
    mut step: impl FnMut(Option<Instant>) -> Option<T> + Send,
) -> Result<T, Error> {
    loop {
        let slice = handles_signals().then(|| Instant::now() + SLICE);
        let limit = [until, slice].into_iter().flatten().min();
        if let Some(result) = py.detach(|| step(limit)) {
            return Ok(result);
        }
        py.check_signals()?;
    }
}

/// A limit in seconds.
pub fn duration(timeout_s: f64, name: &str) -> Result<Duration, Error> {
    if timeout_s >= ENDLESS_S {
        return Ok(Duration::from_secs(1_000_000_000));
    }
    Duration::try_from_secs_f64(timeout_s).map_err(|_| {
        Error::invalid(format!("{name} is {timeout_s}, a number of seconds from 0 on is expected"), name)
    })
}

/// A limit in seconds, or none.
pub fn optional_duration(timeout_s: Option<f64>, name: &str) -> Result<Option<Duration>, Error> {
    timeout_s.map(|timeout_s| duration(timeout_s, name)).transpose()
}

/// The process that made a handle.
#[derive(Debug)]
pub struct Owner(u32);

impl Owner {
    /// This process.
    pub fn this_process() -> Self {
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Fails in a forked process: descriptors are shared with the owner, threads and locks were left behind.
    pub fn check(&self, what: &str) -> Result<(), Error> {
        if self.0 == FORKS.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(Error::internal(format!(
            "{what} is used in another process than the one that made it (after a fork)"
        )))
    }
}

/// Takes over a descriptor number that the caller gives away, and makes it close-on-exec.
pub fn take_fd(number: RawFd) -> Result<OwnedFd, Error> {
    let fd = borrow_fd(number)?;
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|errno| bad_fd(number, errno as i32))?;
    // SAFETY: it is open, as `borrow_fd` has checked, and the contract of `take_…` arguments gives it to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A copy of the descriptor of a process that is watched: a `ChildProcess`, or whatever has a `fileno()` that becomes readable
/// when the process has ended.
pub fn watched_fd(watch: &Bound<'_, PyAny>) -> Result<OwnedFd, Error> {
    let number: RawFd = watch.call_method0("fileno")?.extract()?;
    borrow_fd(number)?.try_clone_to_owned().map_err(|error| bad_fd(number, error.raw_os_error().unwrap_or(0)))
}

/// Looks at a descriptor number that stays the caller's, for the time of one call.
pub fn borrow_fd<'a>(number: RawFd) -> Result<BorrowedFd<'a>, Error> {
    if number < 0 {
        return Err(bad_fd(number, nix::errno::Errno::EBADF as i32));
    }
    // SAFETY: not -1; that it is open is checked by the next statement, and the caller keeps it so during the call.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(fd, FcntlArg::F_GETFD).map_err(|errno| bad_fd(number, errno as i32))?;
    Ok(fd)
}

fn bad_fd(number: RawFd, errno: i32) -> Error {
    Error::host(
        format!("descriptor {number} can't be used: {}", nix::errno::Errno::from_raw(errno)),
        errno,
        format!("descriptor {number}"),
    )
}
