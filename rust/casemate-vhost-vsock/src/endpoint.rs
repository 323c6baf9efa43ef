//! A stream socket of the host: non-blocking, edge-triggered, with a backlog of what it did not take.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use crate::backlog::Backlog;
use crate::chain::push_iovecs;
use crate::greeting::MAX_LINE_BYTES;

/// What came of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// This many bytes.
    Bytes(usize),
    /// Nothing now; an event will tell.
    Nothing,
    /// No more will come.
    End,
}

/// The other side takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deaf;

/// A connected socket.
#[derive(Debug)]
pub struct Endpoint {
    socket: UnixStream,
    readable: bool,
    writable: bool,
    peer_ended: bool,
    hung_up: bool,
    backlog: Backlog,
}

impl Endpoint {
    /// Take a connected, non-blocking socket.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            readable: false,
            writable: true,
            peer_ended: false,
            hung_up: false,
            backlog: Backlog::default(),
        }
    }

    /// Note what epoll reported.
    pub fn on_events(&mut self, events: EventSet) {
        self.readable |=
            events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        self.writable |= events.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR);
        self.peer_ended |= events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        self.hung_up |= events.intersects(EventSet::HANG_UP | EventSet::ERROR);
    }

    /// Whether reading may give something.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// Whether the other side has ended its direction; what it sent before may still be unread.
    pub fn is_peer_ended(&self) -> bool {
        self.peer_ended
    }

    /// The end was read: nothing more can come.
    ///
    /// Asks at once whether the other direction is over too: the event that says so may not have been taken yet, and the
    /// guest is better told everything in one packet.
    pub fn on_end(&mut self) {
        self.readable = false;
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one pollfd is passed, and it is writable.
        if unsafe { libc::poll(&raw mut poll, 1, 0) } == 1 {
            self.hung_up |= poll.revents & (libc::POLLHUP | libc::POLLERR) != 0;
        }
    }

    /// Whether both directions are over.
    pub fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether bytes wait for the socket.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Forget the backlog.
    pub fn drop_backlog(&mut self) {
        self.backlog.clear();
    }

    /// Read into `iovecs`, `wanted` bytes in all.
    ///
    /// # Safety
    /// Each iovec points to memory that may be written from anywhere for its length.
    pub unsafe fn receive(&mut self, iovecs: &mut [libc::iovec], wanted: usize) -> Received {
        let mut message = message_of(iovecs);
        // SAFETY: the message names `iovecs` only, which the caller vouches for.
        let result = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        match count_of(result) {
            Ok(0) => Received::End,
            Ok(bytes) => {
                // A short read has emptied the socket and what comes later raises an event; only the end does not.
                self.readable = bytes == wanted || self.peer_ended;
                Received::Bytes(bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Received::Nothing
            }
            Err(_) => {
                self.hung_up = true;
                Received::End
            }
        }
    }

    /// Look at the first bytes without taking them.
    pub fn peek(&mut self, bytes: &mut [u8; MAX_LINE_BYTES]) -> Received {
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: the buffer is writable for its length.
        let result =
            unsafe { libc::recv(self.socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) };
        match count_of(result) {
            Ok(0) => Received::End,
            Ok(bytes) => Received::Bytes(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
            Err(_) => Received::End,
        }
    }

    /// Take the first `bytes` (at most a line), which [`Endpoint::peek`] has seen.
    pub fn skip(&mut self, bytes: usize) -> bool {
        let mut line = [0; MAX_LINE_BYTES];
        let length = bytes.min(MAX_LINE_BYTES);
        // SAFETY: the buffer is writable for `length` bytes.
        let result = unsafe {
            libc::recv(self.socket.as_raw_fd(), line.as_mut_ptr().cast(), length, libc::MSG_DONTWAIT)
        };
        count_of(result).is_ok_and(|taken| taken == bytes)
    }

    /// Write a short line at once; false when it did not go out whole.
    pub fn write_line(&mut self, line: &str) -> bool {
        let mut iovecs = [libc::iovec { iov_base: line.as_ptr().cast_mut().cast(), iov_len: line.len() }];
        // SAFETY: the iovec is the line, which is only read.
        let written = unsafe { self.write(&mut iovecs) };
        written == Ok(line.len())
    }

    /// Write; zero when the socket takes nothing now.
    ///
    /// # Safety
    /// Each iovec points to memory that may be read for its length.
    unsafe fn write(&mut self, iovecs: &mut [libc::iovec]) -> Result<usize, Deaf> {
        let message = message_of(iovecs);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message names `iovecs` only, which the caller vouches for.
        let result = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, flags) };
        match count_of(result) {
            Ok(bytes) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(_) => Err(Deaf),
        }
    }

    /// Write `bytes` bytes in `segments`, keep in the backlog what the socket does not take; return what it took.
    pub fn send(&mut self, segments: &[VolatileSlice<'_>], bytes: usize) -> Result<usize, Deaf> {
        let mut taken = 0;
        if self.writable && self.backlog.is_empty() {
            let mut iovecs = Vec::with_capacity(segments.len());
            push_iovecs(segments, 0, bytes, &mut iovecs);
            // SAFETY: the slices lie in mapped guest memory that `segments` borrows; the kernel reads it.
            taken = unsafe { self.write(&mut iovecs) }?;
            self.writable = taken == bytes;
        }
        let mut skip = taken;
        for slice in segments {
            let skipped = slice.len().min(skip);
            skip -= skipped;
            if let Ok(rest) = slice.offset(skipped)
                && !rest.is_empty()
            {
                self.backlog.append(&rest);
            }
        }
        Ok(taken)
    }

    /// Write what waits; return what the socket took.
    pub fn flush(&mut self) -> Result<usize, Deaf> {
        let mut taken = 0;
        while self.writable && !self.backlog.is_empty() {
            let waiting = self.backlog.as_slice();
            let wanted = waiting.len();
            let mut iovecs = [libc::iovec { iov_base: waiting.as_ptr().cast_mut().cast(), iov_len: wanted }];
            // SAFETY: the iovec is the backlog, which is only read and not changed meanwhile.
            let bytes = unsafe { self.write(&mut iovecs) }?;
            self.writable = bytes == wanted;
            self.backlog.consume(bytes);
            taken += bytes;
        }
        Ok(taken)
    }

    /// End one direction or both for the other side too.
    pub fn shutdown(&self, how: Shutdown) {
        // Fails only when the other side is gone, and then there is nobody to tell.
        let _ = self.socket.shutdown(how);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // A forked child may hold a duplicate: closing alone would not tell the other side.
        self.shutdown(Shutdown::Both);
    }
}

impl AsRawFd for Endpoint {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn message_of(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero bytes are a valid msghdr that names nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len() as _;
    message
}

fn count_of(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
