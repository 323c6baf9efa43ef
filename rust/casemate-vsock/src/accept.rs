//! Waiting for the guest to connect.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{SockFlag, accept4};

use crate::error::VsockError;
use crate::patience::{Attempt, Patience};

/// Accepts one connection; the new socket is blocking and close-on-exec. Blocks.
///
/// A listener in blocking mode must not be accepted on elsewhere at the same time: a connection taken away between the wait
/// and the accept would make this wait without a deadline.
///
/// # Errors
/// [`VsockError`].
pub fn accept(listener: BorrowedFd<'_>, patience: Patience<'_>) -> Result<OwnedFd, VsockError> {
    let attempt = Attempt::new(patience, format!("listener {}", listener.as_raw_fd()));
    loop {
        attempt.wait(Some((listener, PollFlags::POLLIN)), None)?;
        casemate_failpoint::hit("native.accept")?;
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: accept4 has just made this descriptor and nothing else knows its number.
            Ok(number) => return Ok(unsafe { OwnedFd::from_raw_fd(number) }),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(attempt.io("accept", errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::{Duration, Instant};

    use super::*;

    fn patience(timeout_ms: u64) -> Patience<'static> {
        Patience { timeout: Duration::from_millis(timeout_ms), watch: None, is_interrupted: &|| false }
    }

    #[test]
    fn accept_when_a_peer_connects_then_the_socket_is_blocking_and_close_on_exec() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut peer = UnixStream::connect(&path).unwrap();
        let socket = accept(listener.as_fd(), patience(5000)).unwrap();
        let flags = nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, 1);
        let mut socket = UnixStream::from(socket);
        peer.write_all(b"x").unwrap();
        socket.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn accept_when_nobody_comes_then_deadline_exceeded_not_before_its_time() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let started = Instant::now();
        let error = accept(listener.as_fd(), patience(30)).unwrap_err();
        assert!(matches!(error, VsockError::DeadlineExceeded { .. }), "{error:?}");
        assert!(started.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn accept_when_the_watched_process_ends_then_told_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let (watch, process) = UnixStream::pair().unwrap();
        let ending = std::thread::spawn(move || drop(process));
        let error = accept(listener.as_fd(), Patience { watch: Some(watch.as_fd()), ..patience(20_000) });
        assert!(matches!(error, Err(VsockError::WatchEnded { .. })), "{error:?}");
        ending.join().unwrap();
    }

    #[test]
    fn accept_when_interrupted_then_eintr() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let error = accept(listener.as_fd(), Patience { is_interrupted: &|| true, ..patience(20_000) });
        assert!(matches!(error, Err(VsockError::Io { errno: Errno::EINTR, .. })), "{error:?}");
    }
}
