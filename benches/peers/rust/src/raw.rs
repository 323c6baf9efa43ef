//! The floor: frames made by hand, one write and one read a call, nothing between.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Failure;
use crate::bench::Client;

/// A request frame of service `s`, method `m` with a payload of this size; the stream id is at bytes 4 to 8.
pub fn request_frame(size: usize) -> Vec<u8> {
    let mut body = b"\x0a\x01s\x12\x01m\x1a".to_vec();
    let mut left = size;
    while left > 0x7f {
        body.push((left & 0x7f) as u8 | 0x80);
        left >>= 7;
    }
    body.push(left as u8);
    body.resize(body.len() + size, 7);
    let mut frame = (body.len() as u32).to_be_bytes().to_vec();
    frame.extend_from_slice(&[0, 0, 0, 0, 1, 0]);
    frame.extend_from_slice(&body);
    frame
}

/// Bytes of the whole answer frame at the start of `bytes`, and its stream; `None` while it is not whole.
pub fn answer_frame(bytes: &[u8]) -> Option<(usize, u32)> {
    let head = bytes.first_chunk::<10>()?;
    let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let stream = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    (bytes.len() >= 10 + length).then_some((10 + length, stream))
}

/// The payload of an answer frame: behind its tag and length.
pub fn payload(frame: &[u8]) -> Vec<u8> {
    let length_bytes = frame[11..].iter().position(|byte| *byte < 0x80).unwrap_or(0) + 1;
    frame[11 + length_bytes..].to_vec()
}

/// The floor of a client.
pub struct Raw {
    socket: UnixStream,
    /// A request of the size that was asked for last.
    frame: Vec<u8>,
    size: usize,
    buffer: Vec<u8>,
    next: u32,
}

impl Raw {
    /// A client on this connection.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, frame: request_frame(0), size: 0, buffer: vec![0; 1 << 20], next: 1 }
    }

    fn one(&mut self, size: usize) -> Result<(), Failure> {
        self.frame[4..8].copy_from_slice(&self.next.to_be_bytes());
        self.socket.write_all(&self.frame)?;
        let mut held = 0;
        loop {
            held += self.socket.read(&mut self.buffer[held..])?;
            if let Some((end, stream)) = answer_frame(&self.buffer[..held]) {
                assert!(stream == self.next && payload(&self.buffer[..end]).len() == size);
                self.next += 2;
                return Ok(());
            }
        }
    }
}

impl Client for Raw {
    fn calls(&mut self, window: usize, size: usize) -> Result<(), Failure> {
        if size != self.size {
            (self.frame, self.size) = (request_frame(size), size);
        }
        if window == 1 {
            return self.one(size);
        }
        self.socket.set_nonblocking(true)?;
        let (mut sent, mut offset, mut answered, mut held) = (0, 0, 0, 0);
        while answered < window {
            while sent < window {
                self.frame[4..8].copy_from_slice(&(self.next + 2 * sent as u32).to_be_bytes());
                match self.socket.write(&self.frame[offset..]) {
                    Ok(bytes) if offset + bytes == self.frame.len() => (sent, offset) = (sent + 1, 0),
                    Ok(bytes) => offset += bytes,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
            match self.socket.read(&mut self.buffer[held..]) {
                Ok(0) => return Err("the server closed the connection".into()),
                Ok(bytes) => held += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut interest = PollFlags::POLLIN;
                    interest.set(PollFlags::POLLOUT, sent < window);
                    poll(&mut [PollFd::new(self.socket.as_fd(), interest)], PollTimeout::NONE)?;
                }
                Err(error) => return Err(error.into()),
            }
            let mut start = 0;
            while let Some((end, _)) = answer_frame(&self.buffer[start..held]) {
                assert!(payload(&self.buffer[start..start + end]).len() == size);
                start += end;
                answered += 1;
            }
            self.buffer.copy_within(start..held, 0);
            held -= start;
        }
        self.next += 2 * window as u32;
        self.socket.set_nonblocking(false)?;
        Ok(())
    }
}
