//! From a request to a running program: everything between clone and exec.
//!
//! The child shares this process's memory until it executes the program (as `posix_spawn` does it), while the thread that
//! made it sleeps. So starting costs the same however large the process is, an error comes back through memory, and between
//! clone and exec nothing may allocate, lock or panic: [`run_child`] makes system calls on what was prepared, nothing else.

use std::ffi::{CString, OsString, c_char, c_int, c_void};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::pipe2;

use crate::error::{ProcessError, Step};

/// Stack of the child until it executes the program.
const STACK_BYTES: usize = 128 << 10;

/// What to start, and with what.
#[derive(Debug)]
pub struct SpawnRequest {
    /// Program (a path, or a name that is looked up in PATH) and arguments.
    pub argv: Vec<OsString>,
    /// The child's whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory; `None`: that of this process.
    pub cwd: Option<OsString>,
    /// Descriptors and their numbers in the child; 0, 1 and 2 may be among them.
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// Read into a bounded tail until it ends.
    pub console: Option<OwnedFd>,
}

/// A request with everything prepared that can be prepared in this process.
#[derive(Debug)]
pub(crate) struct Prepared {
    program: String,
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: Option<CString>,
    /// Sources are above every target, so that no placing overwrites a source.
    fds: Vec<(OwnedFd, RawFd)>,
    stderr: OwnedFd,
    console: Option<OwnedFd>,
}

/// A process that runs the program.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) stderr: OwnedFd,
    pub(crate) console: Option<OwnedFd>,
}

impl SpawnRequest {
    pub(crate) fn prepare(self) -> Result<Prepared, ProcessError> {
        let Some(name) = self.argv.first().filter(|name| !name.is_empty()) else {
            return Err(ProcessError::Invalid { what: "argv has no program".into() });
        };
        let program = name.to_string_lossy().into_owned();
        let failed = |errno| ProcessError::Spawn { program: program.clone(), step: Step::Prepare, errno };
        check_targets(&self.fds)?;

        let path = self.env.iter().find(|(key, _)| key == "PATH").map(|(_, value)| value.clone());
        let candidates = candidates(name, path)?;
        let argv = self.argv.iter().map(|text| c_string(text.as_bytes())).collect::<Result<_, _>>()?;
        let env = self.env.iter().map(env_entry).collect::<Result<_, _>>()?;
        let cwd = self.cwd.as_ref().map(|text| c_string(text.as_bytes())).transpose()?;

        let above = 1 + self.fds.iter().map(|(_, target)| *target).max().unwrap_or(0).max(2);
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|error| failed(error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)))?;
        let (stderr, stderr_writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(failed)?;
        // Only our end is non-blocking: the child expects a pipe that waits.
        fcntl(&stderr_writer, FcntlArg::F_SETFL(OFlag::empty())).map_err(failed)?;
        let mut fds = Vec::with_capacity(self.fds.len() + 3);
        let defaults = [(null.as_fd(), 0), (null.as_fd(), 1), (stderr_writer.as_fd(), 2)];
        let given = self.fds.iter().map(|(fd, target)| (fd.as_fd(), *target));
        for (source, target) in defaults.into_iter().chain(given) {
            fds.push((duplicate_above(source, above).map_err(failed)?, target));
        }
        if let Some(console) = &self.console {
            let flags = fcntl(console, FcntlArg::F_GETFL).map_err(failed)?;
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
            fcntl(console, FcntlArg::F_SETFL(flags)).map_err(failed)?;
        }
        casemate_failpoint::hit("native.spawn")?;
        Ok(Prepared { program, candidates, argv, env, cwd, fds, stderr, console: self.console })
    }
}

impl Prepared {
    pub(crate) fn program(&self) -> &str {
        &self.program
    }

    /// Makes the child and returns when it runs the program. The calling thread is the one whose end would kill it.
    pub(crate) fn launch(self) -> Result<Launched, ProcessError> {
        let pointers = |texts: &[CString]| -> Vec<*const c_char> {
            texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
        };
        let (argv, env) = (pointers(&self.argv), pointers(&self.env));
        let candidates: Vec<*const c_char> = self.candidates.iter().map(|path| path.as_ptr()).collect();
        let fds: Vec<(RawFd, RawFd)> =
            self.fds.iter().map(|(fd, target)| (fd.as_raw_fd(), *target)).collect();
        let mut plan = Plan {
            parent_pid: nix::unistd::getpid().as_raw(),
            candidates: &candidates,
            argv: argv.as_ptr(),
            env: env.as_ptr(),
            cwd: self.cwd.as_ref().map_or(ptr::null(), |cwd| cwd.as_ptr()),
            fds: &fds,
            failed_step: 0,
            errno: 0,
        };
        let failed = |step, errno| ProcessError::Spawn { program: self.program.clone(), step, errno };
        let (pid, pidfd) = clone_child(&mut plan).map_err(|errno| failed(Step::Clone, errno))?;
        if plan.failed_step != 0 {
            reap(pidfd.as_fd());
            return Err(failed(Step::from_number(plan.failed_step), Errno::from_raw(plan.errno)));
        }
        Ok(Launched { pid, pidfd, stderr: self.stderr, console: self.console })
    }
}

/// Waits for a process that has ended; its exit status, negative for a signal, `None` when another has taken it.
pub(crate) fn reap(pidfd: BorrowedFd<'_>) -> Option<i32> {
    loop {
        match waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED | WaitPidFlag::__WALL) {
            Ok(WaitStatus::Exited(_, code)) => return Some(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Some(-(signal as i32)),
            Err(Errno::EINTR) => {}
            Ok(other) => {
                log::warn!("unexpected status of a child: {other:?}");
                return None;
            }
            Err(errno) => {
                log::warn!("a child was reaped by somebody else: {errno}");
                return None;
            }
        }
    }
}

fn check_targets(fds: &[(OwnedFd, RawFd)]) -> Result<(), ProcessError> {
    let mut targets: Vec<RawFd> = fds.iter().map(|(_, target)| *target).collect();
    targets.sort_unstable();
    if let Some(bad) = targets.iter().find(|target| !(0..1024).contains(*target)) {
        return Err(ProcessError::Invalid {
            what: format!("descriptor number {bad}, 0 to 1023 are possible"),
        });
    }
    if let Some(pair) = targets.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ProcessError::Invalid { what: format!("descriptor number {} is given twice", pair[0]) });
    }
    Ok(())
}

fn c_string(bytes: &[u8]) -> Result<CString, ProcessError> {
    CString::new(bytes).map_err(|error| {
        let text = String::from_utf8_lossy(&error.into_vec()).into_owned();
        ProcessError::Invalid { what: format!("{text:?} contains a NUL byte") }
    })
}

fn env_entry((key, value): &(OsString, OsString)) -> Result<CString, ProcessError> {
    if key.is_empty() || key.as_bytes().contains(&b'=') {
        return Err(ProcessError::Invalid { what: format!("{key:?} can't be a name in the environment") });
    }
    c_string(&[key.as_bytes(), b"=", value.as_bytes()].concat())
}

/// The paths to try for a program, in order.
fn candidates(name: &OsString, path: Option<OsString>) -> Result<Vec<CString>, ProcessError> {
    if name.as_bytes().contains(&b'/') {
        return Ok(vec![c_string(name.as_bytes())?]);
    }
    let path = path.map_or_else(|| b"/usr/local/bin:/usr/bin:/bin".to_vec(), OsStringExt::into_vec);
    let join = |directory: &[u8]| match directory {
        b"" => c_string(&[b"./", name.as_bytes()].concat()),
        directory => c_string(&[directory, b"/", name.as_bytes()].concat()),
    };
    path.split(|byte| *byte == b':').map(join).collect()
}

fn duplicate_above(fd: BorrowedFd<'_>, lowest: RawFd) -> Result<OwnedFd, Errno> {
    let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(lowest))?;
    // SAFETY: fcntl has just made this descriptor and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What the child works off. Read by it, except for the last two fields, which it writes.
struct Plan<'a> {
    parent_pid: i32,
    candidates: &'a [*const c_char],
    argv: *const *const c_char,
    env: *const *const c_char,
    cwd: *const c_char,
    fds: &'a [(RawFd, RawFd)],
    failed_step: i32,
    errno: i32,
}

fn clone_child(plan: &mut Plan<'_>) -> Result<(i32, OwnedFd), Errno> {
    let mut stack = vec![0_u128; STACK_BYTES / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end.cast::<c_void>();
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: CLONE_VFORK keeps this thread asleep until the child has executed the program or exited, so plan, what it
    // points to and the stack outlive the child's use of this memory. The stack's top is aligned to 16 bytes by its element
    // type. This thread has every signal blocked (see `watch`), so no handler of this process runs on the child's stack.
    // `run_child` has the required signature and neither unwinds nor allocates. pidfd is a valid place for one descriptor.
    let pid = unsafe {
        libc::clone(run_child, top, flags, ptr::from_mut(plan).cast::<c_void>(), ptr::from_mut(&mut pidfd))
    };
    let pid = Errno::result(pid)?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Runs in the child, on memory shared with the parent: system calls only.
extern "C" fn run_child(plan: *mut c_void) -> c_int {
    // SAFETY: the pointer is the `&mut Plan` of `clone_child`, whose thread sleeps meanwhile: this is the only access.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    let step = become_program(plan);
    plan.errno = Errno::last_raw();
    plan.failed_step = step as i32;
    // SAFETY: ends the child at once, without running exit handlers of the memory that it shares.
    unsafe { libc::_exit(127) }
}

/// Returns the step that failed, with errno set; does not return when the program runs.
fn become_program(plan: &Plan<'_>) -> Step {
    // SAFETY: plain system calls on integers and on NUL-terminated strings and NULL-terminated arrays that `Prepared`
    // holds; the signal action and set are on this stack and initialised. None of them allocates or takes a lock.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Step::DeathSignal;
        }
        // The parent may have died before the signal was set: then nobody will send it.
        if libc::getppid() != plan.parent_pid {
            libc::_exit(127);
        }
        if libc::setsid() < 0 {
            return Step::Session;
        }
        // Everything inherited is closed on exec; placing clears that for the numbers that are wanted.
        if libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) != 0 {
            return Step::Descriptors;
        }
        for (source, target) in plan.fds {
            if libc::dup2(*source, *target) < 0 {
                return Step::Descriptors;
            }
        }
        if !plan.cwd.is_null() && libc::chdir(plan.cwd) != 0 {
            return Step::Directory;
        }
        // The kernel's own structure, all zero: the default. By system call, because libc refuses the signals that it keeps
        // for itself, and a parent may have ignored these too.
        let default = [0_u64; 4];
        for signal in 1..=64 {
            // Refused for SIGKILL and SIGSTOP, which are at their defaults.
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, ptr::null_mut::<c_void>(), 8);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        execute(plan)
    }
}

/// Tries the candidates as a shell does: goes on when there is no such file, and reports EACCES rather than ENOENT.
///
/// # Safety
/// The pointers of the plan are valid strings and arrays.
unsafe fn execute(plan: &Plan<'_>) -> Step {
    let mut denied = false;
    for candidate in plan.candidates {
        // SAFETY: as this function requires.
        unsafe { libc::execve(*candidate, plan.argv, plan.env) };
        match Errno::last() {
            Errno::EACCES => denied = true,
            Errno::ENOENT | Errno::ENOTDIR => {}
            _ => return Step::Execute,
        }
    }
    (if denied { Errno::EACCES } else { Errno::last() }).set();
    Step::Execute
}
