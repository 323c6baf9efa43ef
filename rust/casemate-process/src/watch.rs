//! The thread that makes, reads, and reaps children.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::SigSet;

use crate::child::{Child, State, UNKNOWN_STATUS};
use crate::error::ProcessError;
use crate::launch::{Launched, Prepared, SpawnRequest, reap};
use crate::tail::Tail;

/// Longest that a start may take: exec from a file system that does not answer.
const SPAWN_LIMIT: Duration = Duration::from_secs(30);

/// Most bytes that are still read of a stream when its process has ended: somebody else may hold it open and write on.
const DRAIN_BYTES: usize = 1 << 20;

const READ_BYTES: usize = 64 << 10;

type Reply = Result<Arc<Child>, ProcessError>;

/// Starts a program tied to the life of this process and returns when it runs.
///
/// It gets SIGKILL when this process ends, a session of its own, default signal dispositions and an empty mask, stdin and
/// stdout on `/dev/null` and stderr on a pipe, unless the request places other descriptors there. A program that changes its
/// credentials loses the parent-death signal.
///
/// # Errors
/// [`ProcessError::Spawn`] with step and error number; [`ProcessError::Invalid`].
pub fn spawn(request: SpawnRequest) -> Reply {
    let prepared = request.prepare()?;
    let program = prepared.program().to_string();
    // A channel without room: the watch thread learns whether the child was taken over, and ends it otherwise.
    let (reply, answer) = sync_channel(0);
    Watch::of_this_process()?.start(Job { prepared, reply })?;
    answer
        .recv_timeout(SPAWN_LIMIT)
        .unwrap_or(Err(ProcessError::SpawnTimedOut { program, timeout: SPAWN_LIMIT }))
}

struct Job {
    prepared: Prepared,
    reply: SyncSender<Reply>,
}

struct Watch {
    jobs: Mutex<VecDeque<Job>>,
    wake: EventFd,
}

impl Watch {
    /// The watch of this process, started on first use; a forked process gets one of its own.
    fn of_this_process() -> Result<Arc<Self>, ProcessError> {
        static WATCH: Mutex<Option<(u32, Arc<Watch>)>> = Mutex::new(None);
        let mut slot = WATCH.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = std::process::id();
        if let Some((owner, watch)) = slot.as_ref()
            && *owner == pid
        {
            return Ok(Arc::clone(watch));
        }
        let watch = Self::begin()?;
        *slot = Some((pid, Arc::clone(&watch)));
        Ok(watch)
    }

    fn begin() -> Result<Arc<Self>, ProcessError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake =
            EventFd::from_value_and_flags(0, flags).map_err(|errno| ProcessError::io("eventfd", errno))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| ProcessError::io("epoll_create", errno))?;
        let watch = Arc::new(Self { jobs: Mutex::default(), wake });
        epoll
            .add(watch.wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE))
            .map_err(|errno| ProcessError::io("epoll_ctl", errno))?;
        let mut watcher = Loop {
            watch: Arc::clone(&watch),
            epoll,
            entries: HashMap::new(),
            next: 0,
            buffer: vec![0; READ_BYTES],
        };
        // Blocked from its first moment on: signals belong to the program's own threads, and a child that shares this
        // memory must not run their handlers.
        let before = SigSet::all()
            .thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)
            .map_err(|errno| ProcessError::io("sigmask", errno))?;
        let started = std::thread::Builder::new().name("casemate-watch".into()).spawn(move || watcher.run());
        before.thread_set_mask().map_err(|errno| ProcessError::io("sigmask", errno))?;
        started.map_err(|error| {
            ProcessError::io(
                "thread start",
                error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw),
            )
        })?;
        Ok(watch)
    }

    fn start(&self, job: Job) -> Result<(), ProcessError> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).push_back(job);
        match self.wake.write(1) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(ProcessError::io("eventfd", errno)),
        }
    }
}

/// What an event is about; the rest of its number is the entry.
const PIDFD: u64 = 0;
const STDERR: u64 = 1;
const CONSOLE: u64 = 2;
const KINDS: u64 = 4;
const WAKE: u64 = u64::MAX;

struct Entry {
    child: Arc<Child>,
    stderr: Option<OwnedFd>,
    console: Option<OwnedFd>,
}

struct Loop {
    watch: Arc<Watch>,
    epoll: Epoll,
    entries: HashMap<u64, Entry>,
    next: u64,
    buffer: Vec<u8>,
}

impl Loop {
    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 32];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    // Can't happen with a valid descriptor. This thread must not end: that would kill every child.
                    log::error!("epoll_wait failed: {errno}");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    WAKE => self.work_off_jobs(),
                    data => self.handle(data / KINDS, data % KINDS),
                }
            }
        }
    }

    fn work_off_jobs(&mut self) {
        if let Err(errno) = self.watch.wake.read() {
            log::debug!("wake-up event: {errno}");
        }
        loop {
            let job = self.watch.jobs.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(Job { prepared, reply }) = job else { return };
            let result = prepared.launch().and_then(|launched| self.adopt(launched));
            let child = result.as_ref().ok().cloned();
            if reply.send(result).is_err()
                && let Some(child) = child
                && let Err(error) = child.send_signal(libc::SIGKILL)
            {
                log::error!("process {} that nobody waits for: {error}", child.pid());
            }
        }
    }

    fn adopt(&mut self, launched: Launched) -> Reply {
        let Launched { pid, pidfd, stderr, console } = launched;
        let child = Arc::new(Child::new(pid, start_time_ticks(pid), pidfd));
        let number = self.next;
        self.next += 1;
        let fds = [
            (Some(child.as_fd()), PIDFD),
            (Some(stderr.as_fd()), STDERR),
            (console.as_ref().map(AsFd::as_fd), CONSOLE),
        ];
        for (fd, kind) in fds {
            let Some(fd) = fd else { continue };
            if let Err(errno) =
                self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, number * KINDS + kind))
            {
                // A console that can't be polled, or no memory: there must be no child that is not watched.
                child.send_signal(libc::SIGKILL)?;
                reap(child.as_fd());
                return Err(ProcessError::io("epoll_ctl", errno));
            }
        }
        self.entries.insert(number, Entry { child: Arc::clone(&child), stderr: Some(stderr), console });
        Ok(child)
    }

    fn handle(&mut self, number: u64, kind: u64) {
        let Some(entry) = self.entries.get_mut(&number) else { return };
        let (stream, pick): (_, PickTail) = match kind {
            PIDFD => return self.end(number),
            STDERR => (&mut entry.stderr, |state| &mut state.stderr),
            _ => (&mut entry.console, |state| &mut state.console),
        };
        // One read an event: a process that writes without end does not keep the others waiting.
        if let Some(fd) = stream
            && read_once(fd, &entry.child, pick, &mut self.buffer) == Progress::Ended
        {
            // Closing takes it out of the epoll set.
            *stream = None;
        }
    }

    /// The process has ended: reads what is left, reaps it, tells those who wait.
    fn end(&mut self, number: u64) {
        let Some(entry) = self.entries.remove(&number) else { return };
        if let Err(errno) = self.epoll.delete(entry.child.as_fd()) {
            log::error!("process {} can't be taken off the watch: {errno}", entry.child.pid());
        }
        let streams: [(Option<OwnedFd>, PickTail); 2] =
            [(entry.stderr, |state| &mut state.stderr), (entry.console, |state| &mut state.console)];
        for (stream, pick) in streams {
            let Some(fd) = stream else { continue };
            let mut left = DRAIN_BYTES;
            while let Progress::Read(bytes) = read_once(&fd, &entry.child, pick, &mut self.buffer) {
                left = left.saturating_sub(bytes);
                if left == 0 {
                    break;
                }
            }
        }
        let status = reap(entry.child.as_fd());
        entry.child.set_ended(status.unwrap_or(UNKNOWN_STATUS));
    }
}

type PickTail = fn(&mut State) -> &mut Tail;

#[derive(PartialEq, Eq)]
enum Progress {
    Read(usize),
    Nothing,
    Ended,
}

fn read_once(fd: &OwnedFd, child: &Child, pick: PickTail, buffer: &mut [u8]) -> Progress {
    match nix::unistd::read(fd, buffer) {
        // A console on a pseudo-terminal ends with EIO.
        Ok(0) | Err(Errno::EIO | Errno::ECONNRESET) => Progress::Ended,
        Ok(bytes) => {
            pick(&mut child.lock()).push(&buffer[..bytes]);
            Progress::Read(bytes)
        }
        Err(Errno::EAGAIN | Errno::EINTR) => Progress::Nothing,
        Err(errno) => {
            log::warn!("a stream of process {} can't be read: {errno}", child.pid());
            Progress::Ended
        }
    }
}

/// Field 22 of `/proc/<pid>/stat`; 0 where there is no `/proc`.
fn start_time_ticks(pid: i32) -> u64 {
    // The second field is the program's name in parentheses and may contain anything: count from its end.
    let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let behind_name = stat.iter().rposition(|byte| *byte == b')').map_or(&[][..], |at| &stat[at + 1..]);
    let text = String::from_utf8_lossy(behind_name);
    text.split_ascii_whitespace().nth(19).and_then(|field| field.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
