//! The loop: requests, the VMM's end, the agent's answers, time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_proto::grpc;
use casemate_ttrpc::slots::Answer;
use casemate_ttrpc::{StreamId, TtrpcError};
use nix::errno::Errno;
use nix::fcntl::posix_fallocate;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt};
use nix::unistd::geteuid;
use prost::Message as _;
use serde_json::{Value, json};

use crate::agent::{Event, Link};
use crate::container::{Kept, Wanted};
use crate::control::{KeepMessage, Limits, Request, Turn, answer, check_container};
use crate::error::ShimError;
use crate::files::write_whole;
use crate::log_file::Stream;
use crate::peer::{Following, Incoming, Peer};
use crate::record::ExitCause;
use crate::vmm::Vmm;

/// Names in the sandbox's directory.
const CONTROL_SOCKET: &str = "keeper.sock";
const END_RECORD: &str = "end.json";
/// Room on disk that is given back when the last records are written: logs may have filled it.
const RESERVE: &str = "reserve";
const RESERVE_BYTES: i64 = 256 << 10;

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
const VMM: u64 = 2;
const AGENT: u64 = 3;
const FIRST_PEER: u64 = 16;

/// Most connections of the control socket.
const MAX_PEERS: usize = 64;
/// Most containers.
const MAX_CONTAINERS: usize = 512;
/// Bytes asked of a stream at once; an agent that sends more is not believed.
const READ_BYTES: u32 = 128 << 10;
/// How long a killed VMM may take to end.
const KILL_TIME: Duration = Duration::from_secs(10);

type Result<T> = std::result::Result<T, ShimError>;

/// How a sandbox is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// It stays.
    No,
    /// Its end was asked for: records are written.
    Wanted,
    /// Its creator went before it was done: nothing of it is to be told.
    Abandoned,
}

/// One sandbox, held.
#[derive(Debug)]
pub struct Keeper {
    directory: PathBuf,
    limits: Limits,
    epoll: Epoll,
    listener: UnixListener,
    signals: SignalFd,
    peers: HashMap<u64, Peer>,
    next_peer: u64,
    /// Held so that the sandbox counts as owned, once it was committed.
    lock: Option<OwnedFd>,
    vmm: Option<Vmm>,
    link: Link<(String, Wanted)>,
    containers: BTreeMap<String, Kept>,
    /// Connections that want a turn; the first has it.
    turns: BTreeMap<Turn, VecDeque<u64>>,
    leaving: Leaving,
    leave_at: Option<Instant>,
}

impl Keeper {
    /// Make the control socket in `directory` and greet the creator, who is at the other end of `creator`.
    ///
    /// Signals are blocked from here on, in every thread that is made later; call it on the only thread.
    ///
    /// # Errors
    /// [`ShimError::System`].
    pub fn new(directory: &Path, creator: OwnedFd, limits: Limits) -> Result<Self> {
        let failed = |op, errno: Errno| ShimError::system(op, "the keeper", errno);
        let mut blocked = SigSet::all();
        for fault in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGABRT] {
            blocked.remove(fault);
        }
        blocked
            .thread_swap_mask(SigmaskHow::SIG_SETMASK)
            .map_err(|errno| failed("mask signals of", errno))?;
        let mut taken = SigSet::empty();
        taken.add(Signal::SIGTERM);
        taken.add(Signal::SIGINT);
        let signals = SignalFd::with_flags(&taken, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|errno| failed("watch signals of", errno))?;
        for name in ["logs", "exits"] {
            let path = directory.join(name);
            if let Err(error) = fs::create_dir(&path)
                && error.kind() != std::io::ErrorKind::AlreadyExists
            {
                return Err(ShimError::system("make", path.to_string_lossy(), error));
            }
        }
        make_reserve(&directory.join(RESERVE));
        let path = directory.join(CONTROL_SOCKET);
        let on_path = |error| ShimError::system("listen on", path.to_string_lossy(), error);
        let listener = UnixListener::bind(&path).map_err(on_path)?;
        listener.set_nonblocking(true).map_err(on_path)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|errno| failed("watch", errno))?;
        for (fd, token) in [(listener.as_fd(), LISTENER), (signals.as_fd(), SIGNALS)] {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
                .map_err(|errno| failed("watch", errno))?;
        }
        let mut keeper = Self {
            directory: directory.to_owned(),
            limits,
            epoll,
            listener,
            signals,
            peers: HashMap::new(),
            next_peer: FIRST_PEER,
            lock: None,
            vmm: None,
            link: Link::new(AGENT),
            containers: BTreeMap::new(),
            turns: BTreeMap::new(),
            leaving: Leaving::No,
            leave_at: None,
        };
        let pid = getsockopt(&creator, sockopt::PeerCredentials).map_or(0, |peer| peer.pid());
        let number = keeper.add_peer(creator, true, pid)?;
        let hello = answer(&Ok(json!({ "keeper_pid": std::process::id() })));
        keeper.send(number, &hello);
        Ok(keeper)
    }

    /// Serve until the VMM has ended, or never will have begun.
    pub fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        while !self.is_over() {
            let count = match self.epoll.wait(&mut events, self.patience()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => {
                    // Can't happen with a valid descriptor; a keeper that can't wait can't keep.
                    log::error!("epoll_wait: {errno}");
                    break;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.accept(),
                    SIGNALS => self.on_signal(),
                    VMM => return self.on_vmm_end(),
                    AGENT => {
                        let event = self.link.on_ready(&self.epoll);
                        self.on_agent(event);
                    }
                    number => self.on_peer(number),
                }
            }
            let now = Instant::now();
            let event = self.link.on_time(&self.epoll, now);
            self.on_agent(event);
            for kept in self.containers.values_mut() {
                kept.turn(now);
            }
            self.answer_followers();
        }
        log::info!("the keeper ends without a VMM");
        self.leave();
    }

    fn is_over(&self) -> bool {
        self.leaving != Leaving::No
            && (self.vmm.is_none() || self.leave_at.is_some_and(|at| at <= Instant::now()))
    }

    fn patience(&self) -> EpollTimeout {
        let deadlines = self.containers.values().filter_map(Kept::deadline);
        let next = deadlines.chain(self.link.deadline()).chain(self.leave_at).min();
        next.map_or(EpollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
            EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
        })
    }

    fn accept(&mut self) {
        loop {
            let number =
                match accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                    Ok(number) => number,
                    Err(Errno::EAGAIN) => return,
                    Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                    Err(errno) => return log::warn!("nobody can be let in: {errno}"),
                };
            // SAFETY: accept4 has just made this descriptor and nothing else knows its number.
            let socket = unsafe { OwnedFd::from_raw_fd(number) };
            let peer = getsockopt(&socket, sockopt::PeerCredentials);
            let Some(peer) = peer.ok().filter(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw())
            else {
                log::warn!("somebody who is not the sandbox's user was sent away");
                continue;
            };
            if self.peers.len() >= MAX_PEERS {
                log::warn!("more than {MAX_PEERS} connections: one was sent away");
            } else if let Err(error) = self.add_peer(socket, false, peer.pid()) {
                log::warn!("{error}");
            }
        }
    }

    fn add_peer(&mut self, socket: OwnedFd, is_creator: bool, pid: i32) -> Result<u64> {
        let number = self.next_peer;
        self.next_peer += 1;
        self.epoll
            .add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, number))
            .map_err(|errno| ShimError::system("watch", "a connection", errno))?;
        self.peers.insert(number, Peer::new(socket, is_creator, pid));
        Ok(number)
    }

    fn on_peer(&mut self, number: u64) {
        if let Some(peer) = self.peers.get_mut(&number)
            && peer.wants_write()
            && peer.flush().is_err()
        {
            return self.drop_peer(number);
        }
        // One answer at a time: who does not read his answers is not served.
        while let Some(peer) = self.peers.get_mut(&number)
            && !peer.wants_write()
        {
            match peer.receive() {
                Incoming::Nothing => break,
                Incoming::Ended => return self.drop_peer(number),
                Incoming::Request(request) => {
                    peer.following = None;
                    let result = request.and_then(|(request, fds)| self.serve(number, request, fds));
                    match result {
                        Ok(None) => {}
                        Ok(Some(value)) => self.send(number, &answer(&Ok(value))),
                        Err(error) => self.send(number, &answer(&Err(error))),
                    }
                }
            }
        }
        self.watch_peer(number);
    }

    fn watch_peer(&mut self, number: u64) {
        let Some(peer) = self.peers.get(&number) else { return };
        let interest = if peer.wants_write() { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
        if let Err(errno) = self.epoll.modify(peer, &mut EpollEvent::new(interest, number)) {
            log::warn!("a connection can't be watched: {errno}");
            self.drop_peer(number);
        }
    }

    fn send(&mut self, number: u64, line: &[u8]) {
        if let Some(peer) = self.peers.get_mut(&number)
            && peer.send(line).is_err()
        {
            self.drop_peer(number);
        }
    }

    fn drop_peer(&mut self, number: u64) {
        let Some(peer) = self.peers.remove(&number) else { return };
        self.end_turns(number);
        if peer.is_creator && self.lock.is_none() && self.leaving == Leaving::No {
            log::info!("the creator went before the sandbox was done");
            self.end(Leaving::Abandoned);
        }
    }

    fn on_signal(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            log::info!("ended by signal {}", signal.ssi_signo);
            self.end(Leaving::Wanted);
        }
    }

    fn end(&mut self, how: Leaving) {
        if self.leaving == Leaving::No {
            self.leaving = how;
        }
        if let Some(vmm) = &self.vmm {
            vmm.kill();
            self.leave_at.get_or_insert(Instant::now() + KILL_TIME);
        }
    }

    /// None: the answer comes later.
    fn serve(&mut self, number: u64, request: Request, fds: Vec<OwnedFd>) -> Result<Option<Value>> {
        let is_creator = self.peers.get(&number).is_some_and(|peer| peer.is_creator);
        match request {
            Request::Spawn(_) | Request::Commit if !is_creator || self.lock.is_some() => {
                Err(ShimError::state("that is the creator's, before the sandbox is done"))
            }
            Request::Spawn(_) if self.vmm.is_some() => Err(ShimError::state("there is a VMM already")),
            Request::Spawn(message) => {
                let vmm = Vmm::start(message, fds)?;
                let (pid, start_time_ticks) = vmm.id();
                self.epoll
                    .add(&vmm, EpollEvent::new(EpollFlags::EPOLLIN, VMM))
                    .inspect_err(|_| vmm.kill())
                    .map_err(|errno| ShimError::system("watch", "the VMM", errno))?;
                self.vmm = Some(vmm);
                log::info!("VMM {pid} started");
                Ok(Some(json!({ "pid": pid, "start_time_ticks": start_time_ticks })))
            }
            Request::Commit if self.vmm.is_none() => Err(ShimError::state("there is no VMM")),
            Request::Commit => {
                self.lock = fds.into_iter().next();
                Ok(Some(json!({})))
            }
            Request::Keep(message) => self.keep(message).map(Some),
            Request::Forget { container } => {
                let kept = self.containers.remove(&container).ok_or_else(|| unknown(&container))?;
                kept.remove();
                Ok(Some(json!({})))
            }
            Request::Follow { container, file, offset } => {
                if !self.containers.contains_key(&container) {
                    return Err(unknown(&container));
                }
                if let Some(peer) = self.peers.get_mut(&number) {
                    peer.following = Some(Following { container, file, offset });
                }
                Ok(None)
            }
            Request::Turn { at } => {
                let queue = self.turns.entry(at).or_default();
                if queue.contains(&number) {
                    return Err(ShimError::state("this connection has asked for that turn already"));
                }
                queue.push_back(number);
                Ok((queue.len() == 1).then(|| json!({})))
            }
            Request::Status => Ok(Some(self.status())),
            Request::Tails => {
                let (stderr, console) = self.vmm.as_ref().map(Vmm::tails).unwrap_or_default();
                Ok(Some(json!({ "stderr": stderr, "console": console })))
            }
            Request::End => {
                self.end(Leaving::Wanted);
                Ok(Some(json!({})))
            }
        }
    }

    /// A connection is gone: what it had is the next one's.
    fn end_turns(&mut self, number: u64) {
        let mut next = Vec::new();
        for queue in self.turns.values_mut() {
            let had_it = queue.front() == Some(&number);
            queue.retain(|waiting| *waiting != number);
            if had_it {
                next.extend(queue.front());
            }
        }
        for number in next {
            self.send(number, &answer(&Ok(json!({}))));
            self.watch_peer(number);
        }
    }

    fn keep(&mut self, message: KeepMessage) -> Result<Value> {
        let KeepMessage { container: id, terminal, agent } = message;
        check_container(&id)?;
        if self.containers.contains_key(&id) {
            return Err(ShimError::state(format!("container {id} is kept already")));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(ShimError::state(format!("{MAX_CONTAINERS} containers are kept, more can't be")));
        }
        let kept = Kept::new(&self.directory, &id, terminal, self.limits.log_bytes);
        self.containers.insert(id.clone(), kept);
        if self.link.is_up() {
            self.ask(&id);
        } else {
            self.link.want(&self.epoll, agent);
        }
        Ok(json!({}))
    }

    fn status(&self) -> Value {
        let containers: BTreeMap<_, _> = self
            .containers
            .iter()
            .map(|(id, kept)| {
                let (logged_bytes, lost_bytes) = kept.log().counts();
                let value = json!({
                    "logged_bytes": logged_bytes,
                    "lost_bytes": lost_bytes,
                    "log_error": kept.log().error(),
                    "exit": kept.record(),
                    "is_unwritten": kept.is_unwritten(),
                });
                (id, value)
            })
            .collect();
        let pid_of = |queue: &VecDeque<u64>| Some(self.peers.get(queue.front()?)?.pid);
        let turns: BTreeMap<_, _> =
            self.turns.iter().filter_map(|(at, queue)| Some((at, pid_of(queue)?))).collect();
        json!({
            "turns": turns,
            "keeper_pid": std::process::id(),
            "vmm_pid": self.vmm.as_ref().map(|vmm| vmm.id().0),
            "committed": self.lock.is_some(),
            "agent_connected": self.link.is_up(),
            "agent_error": self.link.last_error(),
            "vsock_error": self.vmm.as_ref().and_then(Vmm::vsock_error),
            "containers": containers,
        })
    }

    /// Ask the agent for all that is wanted of a container.
    fn ask(&mut self, id: &str) {
        let Some(kept) = self.containers.get(id) else { return };
        for wanted in kept.wanted() {
            self.ask_for(id, wanted);
        }
    }

    fn ask_for(&mut self, id: &str, wanted: Wanted) {
        let (container_id, exec_id) = (id.to_owned(), id.to_owned());
        let tag = (id.to_owned(), wanted);
        match wanted {
            Wanted::End => {
                let message = grpc::WaitProcessRequest { container_id, exec_id };
                self.link.submit(&self.epoll, "WaitProcess", &message, tag);
            }
            Wanted::Output(stream) => {
                let method = if stream == Stream::Stdout { "ReadStdout" } else { "ReadStderr" };
                let message = grpc::ReadStreamRequest { container_id, exec_id, len: READ_BYTES };
                self.link.submit(&self.epoll, method, &message, tag);
            }
        }
    }

    fn on_agent(&mut self, event: Event) {
        match event {
            Event::Nothing => {}
            Event::Connected => {
                let ids: Vec<String> = self.containers.keys().cloned().collect();
                for id in ids {
                    self.ask(&id);
                }
            }
            Event::Answers(answers) => {
                for (slot, answer) in answers {
                    self.on_answer(slot, answer);
                }
            }
        }
    }

    fn on_answer(&mut self, slot: StreamId, answer: Answer) {
        let Some((id, wanted)) = self.link.take_tag(slot) else { return };
        // One that was forgotten since.
        let Some(kept) = self.containers.get_mut(&id) else { return };
        let refused = |error: &TtrpcError| matches!(error, TtrpcError::Rpc(_));
        match (wanted, answer) {
            (Wanted::End, Ok(payload)) => match grpc::WaitProcessResponse::decode(&payload[..]) {
                Ok(end) => {
                    let text = format!("it exited with status {}", end.status);
                    kept.on_end(Some(end.status), ExitCause::Exited, text);
                }
                Err(error) => kept.on_end(
                    None,
                    ExitCause::Unknown,
                    format!("the agent's answer makes no sense: {error}"),
                ),
            },
            (Wanted::Output(stream), Ok(payload)) => {
                let data = grpc::ReadStreamResponse::decode(&payload[..]).map(|answer| answer.data);
                match data {
                    Ok(data) if data.len() <= READ_BYTES as usize => {
                        if kept.on_output(stream, &data) {
                            self.ask_for(&id, wanted);
                        }
                    }
                    _ => {
                        log::warn!("the agent's answer for {} of {id} makes no sense", stream.name());
                        kept.on_stream_end(stream);
                    }
                }
            }
            (Wanted::End, Err(error)) if refused(&error) => {
                kept.on_end(None, ExitCause::Unknown, format!("the agent does not tell its end: {error}"));
            }
            (Wanted::Output(stream), Err(error)) if refused(&error) => kept.on_stream_end(stream),
            // The connection broke: everything is asked for again on the next one.
            (_, Err(error)) => log::debug!("{id}: {error}"),
        }
    }

    fn answer_followers(&mut self) {
        let mut due = Vec::new();
        for (number, peer) in &self.peers {
            let Some(Following { container, file, offset }) = &peer.following else { continue };
            let Some(kept) = self.containers.get(container) else {
                due.push((*number, Err(unknown(container))));
                continue;
            };
            let moved = kept.log().position() != (*file, *offset);
            if moved || kept.record().is_some() {
                due.push((*number, Ok(json!({ "ended": !moved }))));
            }
        }
        for (number, result) in due {
            if let Some(peer) = self.peers.get_mut(&number) {
                peer.following = None;
            }
            self.send(number, &answer(&result));
            self.watch_peer(number);
        }
    }

    fn on_vmm_end(mut self) {
        let Some(vmm) = self.vmm.take() else { return };
        if self.leaving != Leaving::Abandoned {
            // What was on its way when the VMM ended.
            let event = self.link.on_ready(&self.epoll);
            self.on_agent(event);
            let mut record = vmm.end_record(self.leaving == Leaving::Wanted);
            log::info!("VMM {} ended with status {}", record.vmm_pid, record.status);
            let now = Instant::now();
            self.remove(RESERVE);
            for (id, kept) in &mut self.containers {
                let text = format!("the VMM ended with status {} before it", record.status);
                kept.on_end(None, ExitCause::VmmEnded, text);
                kept.close();
                // Once more for those whose record the disk did not take before.
                kept.turn(kept.deadline().unwrap_or(now).max(now));
                if kept.is_unwritten() {
                    record.problems.push(format!("the exit record of {id} could not be written"));
                }
                if let Some(error) = kept.log().error() {
                    record.problems.push(format!("output of {id} is lost: {error}"));
                }
            }
            let document = serde_json::to_vec(&record).unwrap_or_default();
            if let Err(error) = write_whole(&self.directory.join(END_RECORD), &document) {
                log::error!("the VMM's end can't be written: {error}");
            }
            self.answer_followers();
        }
        vmm.close();
        self.leave();
    }

    fn leave(self) {
        self.remove(CONTROL_SOCKET);
    }

    fn remove(&self, name: &str) {
        let path = self.directory.join(name);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("{} can't be removed: {error}", path.display());
        }
    }
}

fn make_reserve(path: &Path) {
    let made = fs::File::create(path)
        .map_err(|error| error.to_string())
        .and_then(|file| posix_fallocate(&file, 0, RESERVE_BYTES).map_err(|errno| errno.to_string()));
    if let Err(error) = made {
        log::info!("no room on disk is kept for the last records: {error}");
    }
}

fn unknown(container: &str) -> ShimError {
    ShimError::Request { kind: "not_found", text: format!("container {container:?} is not kept") }
}
