//! One connection of the control socket: lines and descriptors in, one answer after each.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, send};

use crate::control::{MAX_LINE_BYTES, Request, parse};
use crate::error::ShimError;

/// Most descriptors of one message; the kernel's bound is 253.
const MAX_FDS: usize = 64;
const READ_BYTES: usize = 64 << 10;

/// What a peer waits for.
#[derive(Debug, PartialEq, Eq)]
pub struct Following {
    pub container: String,
    pub file: u64,
    pub offset: u64,
}

/// What comes of reading.
#[derive(Debug)]
pub enum Incoming {
    /// A request with its descriptors, or why it is none.
    Request(Result<(Request, Vec<OwnedFd>), ShimError>),
    /// Nothing whole has come yet.
    Nothing,
    /// The peer has hung up, or sends what can't be told apart any more.
    Ended,
}

/// A connected socket. Its next request is read when the answer of the last one is out: so one peer holds little.
#[derive(Debug)]
pub struct Peer {
    socket: OwnedFd,
    input: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    output: Vec<u8>,
    pub following: Option<Following>,
    pub is_creator: bool,
    /// Process id of who connected.
    pub pid: i32,
}

impl Peer {
    /// Own a connected, non-blocking stream socket.
    pub fn new(socket: OwnedFd, is_creator: bool, pid: i32) -> Self {
        Self {
            socket,
            input: Vec::new(),
            fds: VecDeque::new(),
            output: Vec::new(),
            following: None,
            is_creator,
            pid,
        }
    }

    /// Whether it is to be watched for room to write; else for bytes.
    pub fn wants_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Put an answer on its way.
    pub fn send(&mut self, line: &[u8]) -> io::Result<()> {
        self.output.extend_from_slice(line);
        self.flush()
    }

    /// Send what the socket takes.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.socket.as_raw_fd(), &self.output, flags) {
                Ok(bytes) => drop(self.output.drain(..bytes)),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The next request. Reads only when none is held.
    pub fn receive(&mut self) -> Incoming {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return Incoming::Request(parse(&line[..end]).and_then(|request| self.with_fds(request)));
            }
            if self.input.len() > MAX_LINE_BYTES {
                log::warn!("a line of the control socket has no end");
                return Incoming::Ended;
            }
            match self.read() {
                Ok(0) => return Incoming::Ended,
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Incoming::Nothing,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    log::debug!("control socket: {errno}");
                    return Incoming::Ended;
                }
            }
        }
    }

    fn with_fds(&mut self, request: Request) -> Result<(Request, Vec<OwnedFd>), ShimError> {
        let wanted = request.descriptors();
        if wanted > self.fds.len() {
            let came = self.fds.len();
            return Err(ShimError::invalid(format!(
                "{wanted} descriptors belong to the request, {came} came"
            )));
        }
        let fds = self.fds.drain(..wanted).collect();
        Ok((request, fds))
    }

    fn read(&mut self) -> Result<usize, Errno> {
        let mut space = nix::cmsg_space!([i32; MAX_FDS]);
        let mut buffer = vec![0; READ_BYTES];
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<UnixAddr>(self.socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
        let bytes = message.bytes;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                for number in numbers {
                    // SAFETY: the kernel has just made this descriptor for us and nothing else knows its number.
                    let fd = unsafe { OwnedFd::from_raw_fd(number) };
                    if self.fds.len() < MAX_FDS {
                        self.fds.push_back(fd);
                    }
                }
            }
        }
        self.input.extend_from_slice(&buffer[..bytes]);
        Ok(bytes)
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{IoSlice, Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    fn pair() -> (Peer, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Peer::new(ours.into(), false, 1), theirs)
    }

    fn send_with(theirs: &UnixStream, line: &[u8], fds: &[i32]) {
        let control = [ControlMessage::ScmRights(fds)];
        sendmsg::<()>(theirs.as_raw_fd(), &[IoSlice::new(line)], &control, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn receive_when_a_request_comes_in_parts_then_it_is_whole_once_and_its_descriptor_is_there() {
        let (mut peer, mut theirs) = pair();
        let (reading, writing) = nix::unistd::pipe().unwrap();
        send_with(&theirs, b"{\"op\":", &[reading.as_raw_fd()]);
        assert!(matches!(peer.receive(), Incoming::Nothing));
        theirs.write_all(b"\"commit\"}\n{\"op\":\"status\"}\n").unwrap();
        let Incoming::Request(Ok((Request::Commit, fds))) = peer.receive() else { panic!() };
        nix::unistd::write(&writing, b"x").unwrap();
        let mut byte = [0];
        nix::unistd::read(&fds[0], &mut byte).unwrap();
        assert_eq!(byte, *b"x");
        assert!(matches!(peer.receive(), Incoming::Request(Ok((Request::Status, _)))));
        drop(theirs);
        assert!(matches!(peer.receive(), Incoming::Ended));
    }

    #[test]
    fn receive_when_descriptors_are_missing_then_told_and_the_next_request_is_served() {
        let (mut peer, mut theirs) = pair();
        theirs.write_all(b"{\"op\":\"commit\"}\n{\"op\":\"end\"}\n").unwrap();
        let Incoming::Request(Err(error)) = peer.receive() else { panic!() };
        assert!(error.to_string().contains("1 descriptors"), "{error}");
        assert!(matches!(peer.receive(), Incoming::Request(Ok((Request::End, _)))));
    }

    #[test]
    fn receive_when_a_line_has_no_end_then_it_is_given_up_with_little_held() {
        let (mut peer, theirs) = pair();
        let writer = std::thread::spawn(move || {
            let mut theirs = theirs;
            // The peer hangs up in the middle of it.
            while theirs.write_all(&[b'x'; 65_536]).is_ok() {}
        });
        loop {
            match peer.receive() {
                Incoming::Ended => break,
                Incoming::Nothing => std::thread::yield_now(),
                Incoming::Request(_) => panic!(),
            }
        }
        assert!(peer.input.len() <= MAX_LINE_BYTES + 2 * READ_BYTES);
        drop(peer);
        writer.join().unwrap();
    }

    #[test]
    fn send_when_the_peer_does_not_read_then_the_rest_waits_and_comes() {
        let (mut peer, mut theirs) = pair();
        let line = vec![b'y'; 4 << 20];
        peer.send(&line).unwrap();
        assert!(peer.wants_write());
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; 4 << 20];
            theirs.read_exact(&mut got).unwrap();
            got
        });
        while peer.wants_write() {
            peer.flush().unwrap();
            std::thread::yield_now();
        }
        assert_eq!(reader.join().unwrap(), line);
    }
}
