//! Processes of containers: their end, their streams, signals.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use casemate_proto::grpc::WaitProcessResponse;
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use prost::Message;

use crate::error::{AgentError, Context, Result};
use crate::stream::{Caller, InputStream, OutputStream};

/// How long output is waited for that somebody else may still write, after the end of a process has been told.
const DRAIN_TIME: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct ExitState {
    status: Option<i32>,
    waiters: Vec<(Caller, Option<Arc<Process>>)>,
}

/// The end of a process.
#[derive(Debug, Default)]
pub struct Exit {
    state: Mutex<ExitState>,
    ended: Condvar,
}

impl Exit {
    fn lock(&self) -> MutexGuard<'_, ExitState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Exit code or 128 plus the signal's number; None while it runs.
    pub fn status(&self) -> Option<i32> {
        self.lock().status
    }

    fn set(&self, status: i32) {
        let waiters = {
            let mut state = self.lock();
            state.status = Some(status);
            std::mem::take(&mut state.waiters)
        };
        self.ended.notify_all();
        for (caller, process) in waiters {
            // Not here: writing the answer may take as long as the caller likes.
            let pump = Arc::clone(&caller.pump);
            pump.post(move || answer_wait(caller, process.as_ref(), status));
        }
    }

    /// Block until it has ended; whether it has.
    pub fn wait_for(&self, at_most: Duration) -> bool {
        let state = self.lock();
        let waited = self.ended.wait_timeout_while(state, at_most, |state| state.status.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.status.is_some()
    }
}

fn answer_wait(caller: Caller, process: Option<&Arc<Process>>, status: i32) {
    caller.responder.ok(WaitProcessResponse { status }.encode_to_vec());
    if let Some(process) = process {
        process.end_told();
    }
}

/// Children by pid, until they are reaped.
#[derive(Debug, Default)]
pub struct Children(Mutex<HashMap<Pid, Arc<Exit>>>);

impl Children {
    /// Make a child and know it before it can be reaped.
    pub fn adopt(&self, make: impl FnOnce() -> Result<Pid>) -> Result<(Pid, OwnedFd, Arc<Exit>)> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = make()?;
        let exit = Arc::new(Exit::default());
        known.insert(pid, Arc::clone(&exit));
        // SAFETY: pidfd_open takes a pid and flags; the child is not reaped while the lock is held, so the pid is its own.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) });
        let fd = i32::try_from(fd.context("pidfd_open", pid.to_string())?).unwrap_or(-1);
        // SAFETY: the kernel has just made this descriptor for us.
        Ok((pid, unsafe { OwnedFd::from_raw_fd(fd) }, exit))
    }

    /// Reap whatever has ended, known or orphaned; the pids.
    pub fn reap(&self) -> Vec<Pid> {
        let mut reaped = Vec::new();
        loop {
            let ended = {
                let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                    Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                    Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                    Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return reaped,
                    Ok(_) | Err(Errno::EINTR) => continue,
                    Err(errno) => {
                        log::error!("waitpid: {errno}");
                        return reaped;
                    }
                };
                reaped.push(pid);
                known.remove(&pid).map(|exit| (exit, status))
            };
            if let Some((exit, status)) = ended {
                exit.set(status);
            }
        }
    }
}

/// What a new process is made of.
#[derive(Debug)]
pub struct Parts {
    /// Its name in requests.
    pub exec_id: String,
    /// As the agent sees it.
    pub pid: Pid,
    /// Refers to it, whatever happens to the pid.
    pub pidfd: OwnedFd,
    /// Its end.
    pub exit: Arc<Exit>,
}

/// Streams of a process.
#[derive(Debug)]
pub enum Streams {
    /// Three pipes.
    Pipes {
        /// Writing end.
        stdin: Arc<InputStream>,
        /// Reading end.
        stdout: Arc<OutputStream>,
        /// Reading end.
        stderr: Arc<OutputStream>,
    },
    /// A terminal.
    Terminal {
        /// The side that stays with the agent.
        master: OwnedFd,
        /// What is typed.
        input: Arc<InputStream>,
        /// What is shown.
        output: Arc<OutputStream>,
    },
}

/// One process of a container.
#[derive(Debug)]
pub struct Process {
    parts: Parts,
    streams: Streams,
}

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);

impl Process {
    /// A process that has been made.
    pub fn new(parts: Parts, streams: Streams) -> Arc<Self> {
        Arc::new(Self { parts, streams })
    }

    /// Its name in requests.
    pub fn exec_id(&self) -> &str {
        &self.parts.exec_id
    }

    /// Its end.
    pub fn exit(&self) -> &Exit {
        &self.parts.exit
    }

    /// Refers to it.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.parts.pidfd
    }

    /// Answer when it has ended.
    pub fn wait(self: &Arc<Self>, caller: Caller) {
        let status = {
            let mut state = self.parts.exit.lock();
            let Some(status) = state.status else {
                state.waiters.push((caller, Some(Arc::clone(self))));
                return;
            };
            status
        };
        answer_wait(caller, Some(self), status);
    }

    fn end_told(&self) {
        let deadline = Instant::now() + DRAIN_TIME;
        match &self.streams {
            Streams::Pipes { stdout, stderr, .. } => {
                stdout.end_when_empty_from(deadline);
                stderr.end_when_empty_from(deadline);
            }
            Streams::Terminal { output, .. } => output.end_when_empty_from(deadline),
        }
    }

    /// Its input.
    pub fn stdin(&self) -> &Arc<InputStream> {
        match &self.streams {
            Streams::Pipes { stdin, .. } => stdin,
            Streams::Terminal { input, .. } => input,
        }
    }

    /// Its output, on a terminal all of it.
    pub fn stdout(&self) -> &Arc<OutputStream> {
        match &self.streams {
            Streams::Pipes { stdout, .. } => stdout,
            Streams::Terminal { output, .. } => output,
        }
    }

    /// Its error output; there is none apart on a terminal.
    pub fn stderr(&self) -> Result<&Arc<OutputStream>> {
        match &self.streams {
            Streams::Pipes { stderr, .. } => Ok(stderr),
            Streams::Terminal { .. } => {
                Err(AgentError::NoStream { stream: "stderr", exec_id: self.parts.exec_id.clone() })
            }
        }
    }

    /// Tell the terminal its size in characters.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<()> {
        let Streams::Terminal { master, .. } = &self.streams else {
            return Err(AgentError::NoTerminal { exec_id: self.parts.exec_id.clone() });
        };
        let clamp = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        let size = libc::winsize { ws_row: clamp(rows), ws_col: clamp(columns), ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: an open terminal and a live structure.
        unsafe { set_window_size(master.as_raw_fd(), &raw const size) }
            .context("resize", "terminal")
            .map(drop)
    }

    /// Send a signal. A process that has ended already is no error.
    pub fn signal(&self, signal: u32) -> Result<()> {
        const MAX_SIGNAL: u32 = 64;
        if signal > MAX_SIGNAL {
            return Err(AgentError::invalid("signal", format!("{signal} is above {MAX_SIGNAL}")));
        }
        let number = i32::try_from(signal).unwrap_or(0);
        let fd = self.parts.pidfd.as_raw_fd();
        // SAFETY: an open pidfd, a number, no siginfo, no flags.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, number, std::ptr::null::<u8>(), 0) };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(AgentError::system("signal", format!("{signal} to {}", self.parts.pid), errno)),
        }
    }

    /// Whether the process would do nothing about `signal` although it is first in its pid namespace: the kernel drops
    /// signals without a handler there.
    pub fn ignores(&self, signal: u32) -> bool {
        let path = format!("/proc/{}/status", self.parts.pid);
        std::fs::read_to_string(path).is_ok_and(|status| !handles(&status, signal))
    }
}

/// Whether a process blocks, ignores or catches a signal, by its `/proc/<pid>/status`.
fn handles(status: &str, signal: u32) -> bool {
    let bit = 1_u64 << (signal.saturating_sub(1) & 63);
    status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| matches!(*key, "SigBlk" | "SigIgn" | "SigCgt"))
        .any(|(_, mask)| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & bit != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_handles_when_any_mask_has_the_signal_then_true() {
        let status =
            "Name:\tsh\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000004\nSigCgt:\t0000000000004000\n";
        assert!(handles(status, 15) && handles(status, 3));
        assert!(!handles(status, 1) && !handles("", 15));
    }

    #[test]
    fn test_exit_when_set_then_waiting_ends_with_it() {
        let exit = Arc::new(Exit::default());
        assert!(!exit.wait_for(Duration::from_millis(1)));
        let setter = Arc::clone(&exit);
        let thread = std::thread::spawn(move || setter.set(137));
        assert!(exit.wait_for(Duration::from_secs(10)));
        assert_eq!(exit.status(), Some(137));
        thread.join().expect("no panic");
    }
}
