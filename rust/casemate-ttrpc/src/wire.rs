//! System calls on the connection's socket.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send, sendmsg};

use crate::error::TtrpcError;

/// The time until `deadline`, rounded up to what a poll can wait, so that a wait never ends before it.
pub(crate) fn time_left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999)
}

/// [`time_left`] for poll.
pub(crate) fn poll_timeout(deadline: Instant) -> PollTimeout {
    PollTimeout::try_from(time_left(deadline)).unwrap_or(PollTimeout::MAX)
}

/// Receives at most `buffer.len()` bytes; 0 at the end of the stream. Blocks if the socket does.
pub(crate) fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
    loop {
        match receive_once(fd, buffer, flags) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// As [`receive`], and a signal ends it.
pub(crate) fn receive_once(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
    match recv(fd.as_raw_fd(), buffer, flags) {
        // A peer that died with data unread in its socket ends the stream like one that closed it.
        Err(Errno::ECONNRESET) => Ok(0),
        result => result,
    }
}

/// Most parts that are sent at once; of a message there are three: header, envelope, payload.
pub(crate) const MAX_PARTS: usize = 16;

/// Sends what the socket takes at once of the first [`MAX_PARTS`] parts, from byte `from` of them on; `EAGAIN` when nothing.
pub(crate) fn send_now(fd: BorrowedFd<'_>, parts: &[&[u8]], from: usize) -> Result<usize, Errno> {
    let mut skip = from;
    let mut slices = [IoSlice::new(&[]); MAX_PARTS];
    for (slice, part) in slices.iter_mut().zip(parts) {
        let cut = skip.min(part.len());
        skip -= cut;
        *slice = IoSlice::new(&part[cut..]);
    }
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    if let [whole, rest @ ..] = parts
        && rest.iter().all(|part| part.is_empty())
    {
        let left = &whole[from.min(whole.len())..];
        loop {
            match send(fd.as_raw_fd(), left, flags) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }
    loop {
        match sendmsg::<()>(fd.as_raw_fd(), &slices[..parts.len().min(MAX_PARTS)], &[], flags, None) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Sends all of `parts`. Blocks until the peer took them, at most `stall` without any progress.
pub(crate) fn send_all(fd: BorrowedFd<'_>, parts: &[&[u8]], stall: Duration) -> Result<(), TtrpcError> {
    let total: usize = parts.iter().map(|part| part.len()).sum();
    let mut sent = 0;
    let mut give_up = None;
    while sent < total {
        match send_now(fd, parts, sent) {
            Ok(bytes) => {
                sent += bytes;
                give_up = None;
            }
            Err(Errno::EAGAIN) => {
                let until = *give_up.get_or_insert_with(|| Instant::now() + stall);
                if Instant::now() >= until {
                    return Err(TtrpcError::Stalled { stalled: stall });
                }
                let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
                match poll(&mut fds, poll_timeout(until)) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => return Err(TtrpcError::io("poll", errno)),
                }
            }
            Err(errno) => return Err(TtrpcError::io("send", errno)),
        }
    }
    Ok(())
}
