//! Two clients written for comparison with ours, see `benches/rpc.py`: `echo_peer raw|plain PATH`.
//!
//! `raw` is the floor: frames made by hand, one write and one read a call, nothing between. `plain` is the usual design that
//! ours is not: a reader thread that hands answers to the waiting one.
//!
//! Each line `run N SIZE WINDOW` on standard input is answered by one line: processor nanoseconds of this process, then N
//! times in nanoseconds, each a window's time by its size.

use std::collections::HashMap;
use std::io::{BufRead, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};

type Failure = Box<dyn std::error::Error>;

/// A request frame of service `s`, method `m` with a payload of this size; the stream id is at bytes 4 to 8.
fn request_frame(size: usize) -> Vec<u8> {
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
fn answer_frame(bytes: &[u8]) -> Option<(usize, u32)> {
    let head = bytes.first_chunk::<10>()?;
    let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let stream = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    (bytes.len() >= 10 + length).then_some((10 + length, stream))
}

/// The payload of an answer frame: behind its tag and length.
fn payload(frame: &[u8]) -> Vec<u8> {
    let length_bytes = frame[11..].iter().position(|byte| *byte < 0x80).unwrap_or(0) + 1;
    frame[11 + length_bytes..].to_vec()
}

trait Client {
    /// Makes `window` calls at once and returns when all are answered.
    fn calls(&mut self, frame: &mut [u8], window: usize, size: usize) -> Result<(), Failure>;
}

struct Raw {
    socket: UnixStream,
    buffer: Vec<u8>,
    next: u32,
}

impl Raw {
    fn one(&mut self, frame: &mut [u8], size: usize) -> Result<(), Failure> {
        frame[4..8].copy_from_slice(&self.next.to_be_bytes());
        self.socket.write_all(frame)?;
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
    fn calls(&mut self, frame: &mut [u8], window: usize, size: usize) -> Result<(), Failure> {
        if window == 1 {
            return self.one(frame, size);
        }
        self.socket.set_nonblocking(true)?;
        let (mut sent, mut offset, mut answered, mut held) = (0, 0, 0, 0);
        while answered < window {
            while sent < window {
                frame[4..8].copy_from_slice(&(self.next + 2 * sent as u32).to_be_bytes());
                match self.socket.write(&frame[offset..]) {
                    Ok(bytes) if offset + bytes == frame.len() => (sent, offset) = (sent + 1, 0),
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

#[derive(Default)]
struct Answers {
    by_stream: Mutex<HashMap<u32, Vec<u8>>>,
    news: Condvar,
}

struct Plain {
    socket: UnixStream,
    answers: Arc<Answers>,
    next: u32,
}

impl Plain {
    fn new(socket: UnixStream) -> Result<Self, Failure> {
        let answers = Arc::new(Answers::default());
        let (mut reading, shared) = (socket.try_clone()?, Arc::clone(&answers));
        std::thread::spawn(move || {
            let (mut buffer, mut held) = (vec![0; 1 << 20], 0);
            while let Ok(bytes) = reading.read(&mut buffer[held..]) {
                held += bytes;
                let mut start = 0;
                while let Some((end, stream)) = answer_frame(&buffer[start..held]) {
                    let answer = payload(&buffer[start..start + end]);
                    if let Ok(mut by_stream) = shared.by_stream.lock() {
                        by_stream.insert(stream, answer);
                    }
                    shared.news.notify_one();
                    start += end;
                }
                buffer.copy_within(start..held, 0);
                held -= start;
            }
        });
        Ok(Self { socket, answers, next: 1 })
    }
}

impl Client for Plain {
    fn calls(&mut self, frame: &mut [u8], window: usize, size: usize) -> Result<(), Failure> {
        let first = self.next;
        for _ in 0..window {
            frame[4..8].copy_from_slice(&self.next.to_be_bytes());
            self.socket.write_all(frame)?;
            self.next += 2;
        }
        for stream in (first..self.next).step_by(2) {
            let mut by_stream = self.answers.by_stream.lock().map_err(|_| "the reader died")?;
            let answer = loop {
                if let Some(answer) = by_stream.remove(&stream) {
                    break answer;
                }
                by_stream = self.answers.news.wait(by_stream).map_err(|_| "the reader died")?;
            };
            assert!(answer.len() == size);
        }
        Ok(())
    }
}

fn cpu() -> Result<Duration, Failure> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let time = |value: nix::sys::time::TimeVal| {
        Duration::from_micros(value.tv_sec() as u64 * 1_000_000 + value.tv_usec() as u64)
    };
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let (kind, path) = (arguments.next().unwrap_or_default(), arguments.next().unwrap_or_default());
    let socket = UnixStream::connect(path)?;
    let mut client: Box<dyn Client> = match kind.as_str() {
        "raw" => Box::new(Raw { socket, buffer: vec![0; 1 << 20], next: 1 }),
        "plain" => Box::new(Plain::new(socket)?),
        _ => return Err("usage: echo_peer raw|plain PATH".into()),
    };
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split(' ').skip(1).map(str::parse::<usize>);
        let mut word = || words.next().ok_or("run N SIZE WINDOW is expected");
        let (count, size, window) = (word()??, word()??, word()??);
        let mut frame = request_frame(size);
        let before = cpu()?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let started = Instant::now();
            client.calls(&mut frame, window, size)?;
            times.push(started.elapsed().as_nanos() / window as u128);
        }
        let spent = cpu()? - before;
        let texts: Vec<String> = times.iter().map(ToString::to_string).collect();
        println!("{} {}", spent.as_nanos(), texts.join(" "));
    }
    Ok(())
}
