//! The handle of a running backend.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::error::VhostVsockError;
use crate::mux::Timeouts;
use crate::server::{End, Server};
use crate::stats::{Counters, Stats};

/// Longest wait for the thread in [`VsockBackend::close`].
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What thread and handle share.
#[derive(Debug, Default)]
struct Shared {
    end: Mutex<Option<End>>,
    ended: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the thread is told to stop; given up once it has.
#[derive(Debug)]
struct Wake {
    stop: EventFd,
    vhost: UnixStream,
}

impl Wake {
    fn tell_to_stop(&self) {
        // Fails only when the counter is full, and then the thread has been told.
        let _ = self.stop.write(1);
        // Wakes it also in the middle of a message. Fails only when the VMM is gone.
        let _ = self.vhost.shutdown(Shutdown::Both);
    }
}

/// A vhost-user-vsock device served by a thread of this process.
///
/// Dropping it without [`VsockBackend::close`] tells the thread to end but does not wait. A copy in a forked child does
/// nothing to the parent's.
#[derive(Debug)]
pub struct VsockBackend {
    wake: Mutex<Option<Wake>>,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    thread: Mutex<Option<JoinHandle<()>>>,
    closed: AtomicBool,
    owner_pid: u32,
}

impl VsockBackend {
    /// Serve a guest with context id `guest_cid` on the connected vhost-user socket `take_vhost`.
    ///
    /// `uds_path`, which must not exist, is the host's way to the guest when this returns; the guest's connections to
    /// port P go to `<uds_path>_P`. The backend ends by itself when the VMM closes its end.
    ///
    /// # Errors
    /// [`VhostVsockError::System`] when a system call fails, [`VhostVsockError::ContextId`] when no guest may have the id.
    pub fn start(take_vhost: OwnedFd, uds_path: &Path, guest_cid: u32) -> Result<Self, VhostVsockError> {
        Self::start_with(take_vhost, uds_path, guest_cid, Timeouts::default())
    }

    /// As [`VsockBackend::start`], with other times to wait.
    ///
    /// # Errors
    /// The same.
    pub fn start_with(
        take_vhost: OwnedFd,
        uds_path: &Path,
        guest_cid: u32,
        timeouts: Timeouts,
    ) -> Result<Self, VhostVsockError> {
        if !(3..u32::MAX).contains(&guest_cid) {
            return Err(VhostVsockError::ContextId { cid: guest_cid });
        }
        let system = |op, target: &str| {
            let target = target.to_owned();
            move |source: io::Error| VhostVsockError::system(op, target, source)
        };
        let vhost = UnixStream::from(take_vhost);
        let handle_vhost = vhost.try_clone().map_err(system("duplicate", "the vhost-user socket"))?;
        let stop =
            EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(system("make", "an eventfd"))?;
        let thread_stop = stop.try_clone().map_err(system("duplicate", "an eventfd"))?;
        let shared = Arc::new(Shared::default());
        let counters = Arc::new(Counters::default());
        let server = Server::new(vhost, uds_path, guest_cid, thread_stop, Arc::clone(&counters), timeouts)?;
        let thread_shared = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("casemate-vsock".to_owned())
            .spawn(move || serve(server, &thread_shared))
            .map_err(system("start", "the thread"))?;
        Ok(Self {
            wake: Mutex::new(Some(Wake { stop, vhost: handle_vhost })),
            shared,
            counters,
            thread: Mutex::new(Some(thread)),
            closed: AtomicBool::new(false),
            owner_pid: std::process::id(),
        })
    }

    /// Why the backend ended by itself; None while it runs and after [`VsockBackend::close`].
    #[must_use]
    pub fn error(&self) -> Option<String> {
        if self.closed.load(Ordering::Acquire) {
            return None;
        }
        match &*lock(&self.shared.end) {
            None | Some(End::Stopped) => None,
            Some(End::VmmClosed) => Some("the VMM closed the vhost-user connection".to_owned()),
            Some(End::Failed(text)) => Some(text.clone()),
        }
    }

    /// Counters as they are now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.counters.snapshot()
    }

    /// End the thread, close every connection, remove the socket file. Idempotent. Waits for the thread, at most 5 s.
    ///
    /// # Errors
    /// [`VhostVsockError::StillRunning`] when the thread did not end in time.
    pub fn close(&self) -> Result<(), VhostVsockError> {
        self.closed.store(true, Ordering::Release);
        self.tell_to_stop();
        let end = lock(&self.shared.end);
        let (end, _) = self
            .shared
            .ended
            .wait_timeout_while(end, CLOSE_TIMEOUT, |end| end.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        if end.is_none() {
            return Err(VhostVsockError::StillRunning { waited_s: CLOSE_TIMEOUT.as_secs() });
        }
        drop(end);
        if let Some(thread) = lock(&self.thread).take() {
            // It has set its end as the last thing, and its panics are caught.
            let _ = thread.join();
        }
        lock(&self.wake).take();
        Ok(())
    }

    fn tell_to_stop(&self) {
        if let Some(wake) = &*lock(&self.wake) {
            wake.tell_to_stop();
        }
    }
}

impl Drop for VsockBackend {
    fn drop(&mut self) {
        if std::process::id() == self.owner_pid {
            self.tell_to_stop();
        } else if let Some(thread) = lock(&self.thread).take() {
            // There is no such thread here that could be detached.
            std::mem::forget(thread);
        }
    }
}

fn serve(mut server: Server, shared: &Shared) {
    block_signals();
    let end = catch_unwind(AssertUnwindSafe(|| server.run())).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
        End::Failed(format!("a defect of casemate: {text}"))
    });
    if let End::Failed(text) = &end {
        log::warn!("vsock backend ended: {text}");
    }
    // Sockets and file are gone before anybody is told.
    drop(server);
    *lock(&shared.end) = Some(end);
    shared.ended.notify_all();
}

/// Leave signals to the threads of the program; only those that a fault raises stay.
fn block_signals() {
    // SAFETY: an all-zero set is valid memory for `sigfillset` to fill; the other calls get that set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT] {
            libc::sigdelset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}
