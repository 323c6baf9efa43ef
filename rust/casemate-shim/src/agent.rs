//! The keeper's own connection to the agent: made when it is first needed, and again when it breaks.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use casemate_proto::AGENT_SERVICE;
use casemate_ttrpc::slots::Answer;
use casemate_ttrpc::{Call, Client, StreamId, TtrpcError};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, getsockopt,
    recv, send, socket, sockopt,
};
use prost::Message;

use crate::control::AgentAddress;

/// The agent's port.
const AGENT_PORT: u32 = 1024;
/// Longest first line of the other end.
const MAX_GREETING_BYTES: usize = 64;
/// How long connecting and greeting may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum State {
    /// Nobody wants one.
    Idle,
    /// A try failed; the next one is due at the deadline.
    Pausing,
    /// The kernel's vsock is connecting.
    Connecting(OwnedFd),
    /// `CONNECT` was written, its answer is awaited.
    Greeting(OwnedFd, Vec<u8>),
    /// In use.
    Up(Box<Client>),
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// Nothing to act on.
    Nothing,
    /// There is a connection now: everything that is wanted is to be asked for.
    Connected,
    /// These requests are finished.
    Answers(Vec<(StreamId, Answer)>),
}

/// The connection and how it is got.
#[derive(Debug)]
pub struct Link<T> {
    address: Option<AgentAddress>,
    state: State,
    deadline: Option<Instant>,
    pause: Duration,
    token: u64,
    open: HashMap<StreamId, T>,
    last_error: Option<String>,
}

impl<T> Link<T> {
    /// No connection yet; its socket will be watched under `token`.
    pub fn new(token: u64) -> Self {
        Self {
            address: None,
            state: State::Idle,
            deadline: None,
            pause: FIRST_PAUSE,
            token,
            open: HashMap::new(),
            last_error: None,
        }
    }

    /// Whether requests can be sent.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// Why there was no connection the last time.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// When [`Link::on_time`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Have a connection to the agent at `address` from now on.
    pub fn want(&mut self, epoll: &Epoll, address: AgentAddress) {
        self.address = Some(address);
        if matches!(self.state, State::Idle) {
            self.try_connect(epoll);
        }
    }

    /// Send a request without a deadline. Its `tag` comes back with the answer.
    pub fn submit(&mut self, epoll: &Epoll, method: &str, message: &impl Message, tag: T) {
        let State::Up(client) = &self.state else { return };
        let payload = message.encode_to_vec();
        let call = Call { service: AGENT_SERVICE, method, payload: &payload, timeout: None, metadata: &[] };
        match client.submit(&call) {
            Ok(slot) => {
                self.open.insert(slot, tag);
            }
            Err(error) => log::warn!("{method} can't be sent: {error}"),
        }
        self.watch(epoll);
    }

    /// What the tag of a finished request was.
    pub fn take_tag(&mut self, slot: StreamId) -> Option<T> {
        self.open.remove(&slot)
    }

    /// The socket is ready for something.
    pub fn on_ready(&mut self, epoll: &Epoll) -> Event {
        match &mut self.state {
            State::Idle | State::Pausing => Event::Nothing,
            State::Connecting(socket) => match getsockopt(socket, sockopt::SocketError) {
                Ok(0) => self.rise(epoll),
                Ok(error) => self.fall(&Errno::from_raw(error).to_string()),
                Err(errno) => self.fall(&errno.to_string()),
            },
            State::Greeting(socket, line) => match read_greeting(socket.as_fd(), line) {
                Ok(false) => Event::Nothing,
                Ok(true) => self.rise(epoll),
                Err(error) => self.fall(&error.to_string()),
            },
            State::Up(client) => {
                client.on_writable();
                let answers = client.on_readable();
                // An agent that takes connections and serves none is not asked ever faster.
                if answers.iter().any(|(_, answer)| answer.is_ok()) {
                    self.pause = FIRST_PAUSE;
                }
                if let Some(error) = client.broken() {
                    self.fall(&error.to_string());
                } else {
                    self.watch(epoll);
                }
                Event::Answers(answers)
            }
        }
    }

    /// The deadline has come.
    pub fn on_time(&mut self, epoll: &Epoll, now: Instant) -> Event {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return Event::Nothing;
        }
        if matches!(self.state, State::Pausing) {
            return self.try_connect(epoll);
        }
        self.fall("it did not answer in time")
    }

    fn try_connect(&mut self, epoll: &Epoll) -> Event {
        match self.connect(epoll) {
            Ok(()) => Event::Nothing,
            Err(error) => self.fall(&error.to_string()),
        }
    }

    fn connect(&mut self, epoll: &Epoll) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        self.deadline = Some(Instant::now() + CONNECT_TIME);
        match self.address.as_ref().ok_or(io::ErrorKind::NotConnected)? {
            AgentAddress::Hybrid(path) => {
                let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
                connect(socket.as_raw_fd(), &UnixAddr::new(path.0.as_os_str())?)?;
                let greeting = format!("CONNECT {AGENT_PORT}\n");
                if send(socket.as_raw_fd(), greeting.as_bytes(), MsgFlags::MSG_NOSIGNAL)? != greeting.len() {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, self.token))?;
                self.state = State::Greeting(socket, Vec::new());
            }
            AgentAddress::Vsock(cid) => {
                let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
                begin_connect(socket.as_fd(), &VsockAddr::new(*cid, AGENT_PORT))?;
                epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLOUT, self.token))?;
                self.state = State::Connecting(socket);
            }
        }
        Ok(())
    }

    fn rise(&mut self, epoll: &Epoll) -> Event {
        let (State::Connecting(socket) | State::Greeting(socket, _)) =
            std::mem::replace(&mut self.state, State::Pausing)
        else {
            return Event::Nothing;
        };
        match Client::new(socket, None) {
            Ok(client) => {
                self.state = State::Up(Box::new(client));
                self.deadline = None;
                self.last_error = None;
                self.watch(epoll);
                Event::Connected
            }
            Err(error) => self.fall(&error.to_string()),
        }
    }

    /// No connection any more; another try after a pause.
    fn fall(&mut self, why: &str) -> Event {
        if self.last_error.as_deref() != Some(why) {
            log::info!("no connection to the agent: {why}");
        }
        self.last_error = Some(why.to_owned());
        // Dropping the socket takes it off the set.
        self.state = State::Pausing;
        self.open.clear();
        self.deadline = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Event::Nothing
    }

    fn watch(&mut self, epoll: &Epoll) {
        let State::Up(client) = &self.state else { return };
        let Some(number) = client.socket() else { return };
        let mut interest = EpollFlags::EPOLLIN;
        interest.set(EpollFlags::EPOLLOUT, client.wants_write());
        // SAFETY: the client has just said that it holds this descriptor, and it is borrowed for this call alone.
        let socket = unsafe { BorrowedFd::borrow_raw(number) };
        if let Err(errno) = epoll.modify(socket, &mut EpollEvent::new(interest, self.token)) {
            client.fail(&TtrpcError::Closed { reason: format!("epoll_ctl: {errno}") });
            self.fall(&format!("it can't be watched: {errno}"));
        }
    }
}

fn begin_connect(socket: BorrowedFd<'_>, address: &dyn SockaddrLike) -> nix::Result<()> {
    match connect(socket.as_raw_fd(), address) {
        Err(Errno::EINPROGRESS) => Ok(()),
        other => other,
    }
}

/// Read the answer of `CONNECT` and nothing behind it; whether it is whole.
fn read_greeting(socket: BorrowedFd<'_>, line: &mut Vec<u8>) -> io::Result<bool> {
    let mut byte = [0];
    loop {
        match recv(socket.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(io::Error::other("the guest does not take the connection")),
            Ok(_) if byte == [b'\n'] => {
                return if line.starts_with(b"OK ") {
                    Ok(true)
                } else {
                    Err(io::Error::other(format!("{:?} in place of OK", String::from_utf8_lossy(line))))
                };
            }
            Ok(_) if line.len() >= MAX_GREETING_BYTES => {
                return Err(io::Error::other("a line without end in place of OK"));
            }
            Ok(_) => line.push(byte[0]),
            Err(Errno::EAGAIN) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use nix::sys::epoll::{EpollCreateFlags, EpollTimeout};

    use super::*;
    use crate::control::Bytes;

    /// Run the link's events until `is_done`, at most 10 s.
    fn drive(link: &mut Link<u8>, epoll: &Epoll, mut is_done: impl FnMut(&Link<u8>, &Event) -> bool) {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            let mut events = [EpollEvent::empty(); 4];
            let count = epoll.wait(&mut events, EpollTimeout::from(5_u8)).unwrap();
            let event = if count > 0 { link.on_ready(epoll) } else { link.on_time(epoll, Instant::now()) };
            if is_done(link, &event) {
                return;
            }
        }
        panic!("nothing came of it: {link:?}");
    }

    #[test]
    fn want_when_the_guest_refuses_first_then_tried_again_until_it_is_connected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            for answer in [&b""[..], b"NO\n", b"OK 7\n"] {
                let (mut socket, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&socket).read_line(&mut line).unwrap();
                assert_eq!(line, "CONNECT 1024\n");
                socket.write_all(answer).unwrap();
                if answer.starts_with(b"OK") {
                    return socket;
                }
            }
            unreachable!()
        });
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        let mut link: Link<u8> = Link::new(1);
        link.want(&epoll, AgentAddress::Hybrid(Bytes(path.into())));
        drive(&mut link, &epoll, |_, event| matches!(event, Event::Connected));
        assert!(link.is_up() && link.deadline().is_none());
        drop(server.join().unwrap());
        drive(&mut link, &epoll, |link, _| !link.is_up());
        assert!(link.last_error().is_some() && link.deadline().is_some());
    }

    #[test]
    fn want_when_nobody_listens_then_pauses_grow_and_are_bounded() {
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        let mut link: Link<u8> = Link::new(1);
        link.want(&epoll, AgentAddress::Hybrid(Bytes("/nonexistent/s".into())));
        for _ in 0..20 {
            let due = link.deadline().unwrap();
            link.on_time(&epoll, due);
        }
        assert_eq!(link.pause, LONGEST_PAUSE);
        assert!(!link.is_up());
    }
}
