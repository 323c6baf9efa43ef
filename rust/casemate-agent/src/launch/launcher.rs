//! The launcher: a process with one thread that clones children on the agent's request.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, recvmsg,
    sendmsg, shutdown, socketpair,
};
use nix::unistd::{ForkResult, Pid, fork};

use crate::error::{AgentError, Context, Result};
use crate::launch::child;
use crate::launch::status::ChildEnd;

/// Descriptors of one request: status, cgroup, namespaces, stdin, stdout, stderr.
const MAX_FDS: usize = 6;
const HEADER_BYTES: usize = 8 + MAX_FDS;

/// What a child is born with.
#[derive(Debug)]
pub struct Birth<'a> {
    /// New namespaces.
    pub flags: CloneFlags,
    /// The child's end of its status socket.
    pub status: BorrowedFd<'a>,
    /// Directory of its cgroup.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// A pidfd: the namespaces of this process are joined, at birth its pid namespace.
    pub join: Option<BorrowedFd<'a>>,
    /// Its stdin, stdout, stderr; None when it gets a terminal.
    pub stdio: Option<[BorrowedFd<'a>; 3]>,
}

/// Which descriptors come with a request, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Role {
    Status = 1,
    Cgroup = 2,
    Join = 3,
    Stdin = 4,
    Stdout = 5,
    Stderr = 6,
}

/// The agent's handle on the launcher.
#[derive(Debug)]
pub struct Launcher {
    socket: Mutex<OwnedFd>,
    pid: Pid,
    is_over: AtomicBool,
}

impl Launcher {
    /// Fork the launcher off.
    ///
    /// Must be called while this process has one thread. In the launcher it does not return.
    pub fn fork() -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .context("socketpair", "launcher")?;
        // SAFETY: there is one thread, so no lock is held by another and the child may do anything.
        match unsafe { fork() }.context("fork", "launcher")? {
            ForkResult::Parent { child } => {
                Ok(Self { socket: Mutex::new(ours), pid: child, is_over: AtomicBool::new(false) })
            }
            ForkResult::Child => {
                drop(ours);
                serve(&theirs)
            }
        }
    }

    /// The launcher's own process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Let it end: no more children.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Release);
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(errno) = shutdown(socket.as_raw_fd(), Shutdown::Both) {
            log::warn!("launcher can't be ended: {errno}");
        }
    }

    /// Whether [`Launcher::end`] was called.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// Make a child and return its pid, as the agent sees it. Hold whatever keeps it from being reaped unknown.
    pub fn launch(&self, birth: &Birth<'_>) -> Result<Pid> {
        let mut roles = vec![(Role::Status, birth.status)];
        roles.extend(birth.cgroup.map(|fd| (Role::Cgroup, fd)));
        roles.extend(birth.join.map(|fd| (Role::Join, fd)));
        if let Some([stdin, stdout, stderr]) = birth.stdio {
            roles.extend([(Role::Stdin, stdin), (Role::Stdout, stdout), (Role::Stderr, stderr)]);
        }
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&(birth.flags.bits() as u64).to_be_bytes());
        for (place, (role, _)) in header[8..].iter_mut().zip(&roles) {
            *place = *role as u8;
        }
        let fds: Vec<RawFd> = roles.iter().map(|(_, fd)| fd.as_raw_fd()).collect();

        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&header)], &rights, MsgFlags::MSG_NOSIGNAL, None)
            .context("send to", "launcher")?;
        let mut answer = [0; 4];
        let received = loop {
            match nix::unistd::read(&*socket, &mut answer) {
                Err(Errno::EINTR) => {}
                other => break other.context("receive from", "launcher")?,
            }
        };
        match (received, i32::from_be_bytes(answer)) {
            (4, pid) if pid > 0 => Ok(Pid::from_raw(pid)),
            (4, errno) => Err(AgentError::system("clone", "a new process", Errno::from_raw(-errno))),
            _ => Err(AgentError::ChildGone { context: "launcher ended" }),
        }
    }
}

/// Serve requests until the agent's end is closed.
fn serve(socket: &OwnedFd) -> ! {
    let own_pid_namespace = std::fs::File::open("/proc/self/ns/pid").ok();
    loop {
        let Some((flags, fds)) = receive(socket) else { exit_now(0) };
        let answer = match birth(flags, fds, own_pid_namespace.as_ref().map(AsFd::as_fd)) {
            Ok(pid) => pid,
            Err(errno) => -(errno as i32),
        };
        if nix::unistd::write(socket, &answer.to_be_bytes()).is_err() {
            exit_now(0);
        }
    }
}

type Fds = Vec<(u8, OwnedFd)>;

fn receive(socket: &OwnedFd) -> Option<(u64, Fds)> {
    let mut header = [0; HEADER_BYTES];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut parts = [IoSliceMut::new(&mut header)];
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            other => break other.ok()?,
        }
    };
    let is_whole = message.bytes == HEADER_BYTES;
    let mut received = Vec::new();
    for part in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: the kernel made these descriptors for us in this very receive; nobody else knows them.
            received.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let (flags, roles) = header.split_first_chunk::<8>()?;
    is_whole.then(|| (u64::from_be_bytes(*flags), roles.iter().copied().zip(received).collect()))
}

fn take(fds: &mut Fds, role: Role) -> Option<OwnedFd> {
    let index = fds.iter().position(|(found, _)| *found == role as u8)?;
    Some(fds.swap_remove(index).1)
}

fn birth(flags: u64, mut fds: Fds, own_pid_namespace: Option<BorrowedFd<'_>>) -> nix::Result<i32> {
    let status = take(&mut fds, Role::Status).ok_or(Errno::EBADF)?;
    let cgroup = take(&mut fds, Role::Cgroup);
    let join = take(&mut fds, Role::Join);
    let stdio =
        match (take(&mut fds, Role::Stdin), take(&mut fds, Role::Stdout), take(&mut fds, Role::Stderr)) {
            (Some(stdin), Some(stdout), Some(stderr)) => Some([stdin, stdout, stderr]),
            _ => None,
        };
    if let Some(join) = &join {
        // A pid namespace is entered by birth only: the launcher's children are born there until it is set back.
        setns(join, CloneFlags::CLONE_NEWPID)?;
    }
    let result = clone_into(flags, cgroup.as_ref());
    if result == Ok(0) {
        child::run(ChildEnd::new(status), join, stdio);
    }
    if join.is_some() {
        // Without this every later child would be born in that container.
        let restored =
            own_pid_namespace.ok_or(Errno::ENOENT).and_then(|own| setns(own, CloneFlags::CLONE_NEWPID));
        if restored.is_err() {
            exit_now(1);
        }
    }
    result
}

/// `clone3` as a child of the agent, in `cgroup`; 0 in the child.
fn clone_into(flags: u64, cgroup: Option<&OwnedFd>) -> nix::Result<i32> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: an all-zero clone_args asks for nothing; it is a plain structure of numbers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | libc::CLONE_PARENT as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    }
    // SAFETY: no CLONE_VM and no stack: the child runs on with a copy of this one-threaded process, as after fork. The
    // structure lives until the call returns.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    Errno::result(result).map(|pid| i32::try_from(pid).unwrap_or(i32::MAX))
}

/// End without running what the agent's copy of the process has left to do.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` has no requirements.
    unsafe { libc::_exit(status) }
}
