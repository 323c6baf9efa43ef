//! One container: made, started, stopped, gone.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::cgroup::Cgroup;
use crate::error::{AgentError, Context, Result};
use crate::launch::launcher::{Birth, Launcher};
use crate::launch::status::AgentEnd;
use crate::launch::{Plan, clone_flags};
use crate::process::{Children, Parts, Process, Streams};
use crate::stream::{InputStream, OutputStream};

/// How long a new process may take to be ready, and then to execute.
const LAUNCH_LIMIT: Duration = Duration::from_secs(60);
/// How long the kernel may take to end processes that were killed, or to freeze them.
const KERNEL_LIMIT: Duration = Duration::from_secs(30);
/// Ended processes whose end has been told and whose output may still be read.
const MAX_TOLD: usize = 64;

/// What every new process needs.
#[derive(Clone, Copy, Debug)]
pub struct Makers<'a> {
    /// Clones.
    pub launcher: &'a Launcher,
    /// Knows who is reaped.
    pub children: &'a Children,
    /// Size of output pipes; None: the kernel's.
    pub pipe_size_bytes: Option<u32>,
}

#[derive(Debug)]
enum State {
    /// The first process waits to execute.
    Created(AgentEnd),
    Running,
    Paused,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Created(_) => "created",
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

#[derive(Debug, Default)]
struct Processes {
    by_id: HashMap<String, Arc<Process>>,
    told: VecDeque<String>,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    spec: grpc::Spec,
    cgroup: Option<Cgroup>,
    init: Arc<Process>,
    state: Mutex<State>,
    processes: Mutex<Processes>,
    mount_points: Vec<String>,
}

/// Ends of a process's standard streams.
struct Stdio {
    theirs: [OwnedFd; 3],
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

fn make_pipes(size_bytes: Option<u32>) -> Result<Stdio> {
    let pipe = || pipe2(OFlag::O_CLOEXEC).context("pipe", "stdio");
    let ((stdin_theirs, stdin), (stdout, stdout_theirs), (stderr, stderr_theirs)) =
        (pipe()?, pipe()?, pipe()?);
    if let Some(size) = size_bytes.and_then(|size| i32::try_from(size).ok()) {
        for fd in [&stdout, &stderr] {
            fcntl(fd, FcntlArg::F_SETPIPE_SZ(size)).context("set size of", format!("pipe ({size} bytes)"))?;
        }
    }
    Ok(Stdio { theirs: [stdin_theirs, stdout_theirs, stderr_theirs], stdin, stdout, stderr })
}

struct Launch<'a> {
    exec_id: String,
    plan: Plan,
    flags: nix::sched::CloneFlags,
    cgroup: Option<&'a Cgroup>,
    join: Option<&'a OwnedFd>,
}

/// Make a process and wait until it is ready. A child that fails on the way is dead or will be: it loses its plan.
fn launch(makers: &Makers<'_>, launch: Launch<'_>) -> Result<(Arc<Process>, AgentEnd)> {
    let is_terminal = launch.plan.process.as_ref().is_some_and(|process| process.terminal);
    let stdio = if is_terminal { None } else { Some(make_pipes(makers.pipe_size_bytes)?) };
    let (mut status, child_status) = AgentEnd::pair()?;
    let (pid, pidfd, exit) = makers.children.adopt(|| {
        let [stdin, stdout, stderr] = match &stdio {
            Some(stdio) => stdio.theirs.each_ref().map(|fd| Some(fd.as_fd())),
            None => [None, None, None],
        };
        makers.launcher.launch(&Birth {
            flags: launch.flags,
            status: child_status.as_fd(),
            cgroup: launch.cgroup.map(Cgroup::directory),
            join: launch.join.map(AsFd::as_fd),
            stdio: stdin.zip(stdout).zip(stderr).map(|((stdin, stdout), stderr)| [stdin, stdout, stderr]),
        })
    })?;
    drop(child_status);
    let parts = Parts { exec_id: launch.exec_id, pid, pidfd, exit };
    status.send_plan(&launch.plan, LAUNCH_LIMIT)?;
    let terminal = status.wait_ready(LAUNCH_LIMIT)?;
    let streams = match (stdio, terminal) {
        (Some(stdio), _) => Streams::Pipes {
            stdin: InputStream::new(stdio.stdin, false)?,
            stdout: OutputStream::new(stdio.stdout)?,
            stderr: OutputStream::new(stdio.stderr)?,
        },
        (None, Some(master)) => {
            let copy = || master.try_clone().context("dup", "terminal");
            let (input, output) = (InputStream::new(copy()?, true)?, OutputStream::new(copy()?)?);
            Streams::Terminal { master, input, output }
        }
        (None, None) => return Err(AgentError::ChildGone { context: "terminal" }),
    };
    Ok((Process::new(parts, streams), status))
}

/// What a container is made from.
#[derive(Debug)]
pub struct NewContainer {
    /// Its name.
    pub id: String,
    /// Name of its first process in requests.
    pub exec_id: String,
    /// Specification, checked.
    pub spec: grpc::Spec,
    /// Its group; None where the kernel has none.
    pub cgroup: Option<Cgroup>,
    /// Whose pid namespace it joins; None: one of its own.
    pub pid_namespace_of: Option<Arc<Process>>,
    /// Storages to give up at the end.
    pub mount_points: Vec<String>,
}

impl Container {
    /// Make the container with its first process parked before its program.
    ///
    /// On failure the group is removed; storages stay with the caller.
    pub fn create(new: NewContainer, makers: &Makers<'_>) -> Result<Arc<Self>> {
        let linux = new.spec.linux.clone().unwrap_or_default();
        let plan = Plan { process: new.spec.process.clone(), spec: Some(new.spec.clone()), is_exec: false };
        let made = launch(
            makers,
            Launch {
                exec_id: new.exec_id.clone(),
                plan,
                flags: clone_flags(&linux, new.pid_namespace_of.is_some()),
                cgroup: new.cgroup.as_ref(),
                join: new.pid_namespace_of.as_ref().map(|process| process.pidfd()),
            },
        );
        let (init, status) = match made {
            Ok(made) => made,
            Err(error) => {
                remove_group(new.cgroup.as_ref());
                return Err(error);
            }
        };
        let by_id = HashMap::from([(new.exec_id, Arc::clone(&init))]);
        Ok(Arc::new(Self {
            id: new.id,
            spec: new.spec,
            cgroup: new.cgroup,
            init,
            state: Mutex::new(State::Created(status)),
            processes: Mutex::new(Processes { by_id, told: VecDeque::new() }),
            mount_points: new.mount_points,
        }))
    }

    fn lock_state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_processes(&self) -> MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Storages that it uses.
    pub fn mount_points(&self) -> &[String] {
        &self.mount_points
    }

    /// A process by its name; none or the container's own stands for the first.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() || exec_id == self.id {
            return Ok(Arc::clone(&self.init));
        }
        self.lock_processes().by_id.get(exec_id).cloned().ok_or_else(|| AgentError::UnknownProcess {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        })
    }

    /// The end of a process is being told: it is kept for its output, but not for ever.
    pub fn note_told(&self, exec_id: &str) {
        let mut processes = self.lock_processes();
        if exec_id == self.init.exec_id() || processes.told.iter().any(|told| told == exec_id) {
            return;
        }
        processes.told.push_back(exec_id.to_owned());
        while processes.told.len() > MAX_TOLD {
            let Some(oldest) = processes.told.pop_front() else { return };
            let has_ended =
                processes.by_id.get(&oldest).is_some_and(|process| process.exit().status().is_some());
            if has_ended {
                processes.by_id.remove(&oldest);
            } else {
                processes.told.push_back(oldest);
                return;
            }
        }
    }

    /// Let the first process execute.
    pub fn start(&self) -> Result<()> {
        let mut state = self.lock_state();
        let State::Created(status) = &mut *state else {
            return Err(AgentError::WrongState {
                what: format!("container {}", self.id),
                state: state.name(),
            });
        };
        let result = status.start(LAUNCH_LIMIT);
        *state = State::Running;
        result
    }

    /// Start one more process in it.
    pub fn exec(&self, exec_id: &str, mut process: grpc::Process, makers: &Makers<'_>) -> Result<()> {
        if exec_id.is_empty() || self.lock_processes().by_id.contains_key(exec_id) {
            return Err(AgentError::Exists { what: "process", id: exec_id.to_owned() });
        }
        if self.init.exit().status().is_some() {
            return Err(AgentError::WrongState { what: format!("container {}", self.id), state: "stopped" });
        }
        let own = self.spec.process.clone().unwrap_or_default();
        if process.capabilities.is_none() {
            process.capabilities = own.capabilities;
        }
        let plan = Plan { spec: Some(grpc::Spec::default()), process: Some(process), is_exec: true };
        let (process, mut status) = launch(
            makers,
            Launch {
                exec_id: exec_id.to_owned(),
                plan,
                flags: nix::sched::CloneFlags::empty(),
                cgroup: self.cgroup.as_ref(),
                join: Some(self.init.pidfd()),
            },
        )?;
        status.wait_end(LAUNCH_LIMIT)?;
        self.lock_processes().by_id.insert(exec_id.to_owned(), process);
        Ok(())
    }

    /// Send a signal: SIGKILL without a process to all, others to the process.
    pub fn signal(&self, exec_id: &str, signal: u32) -> Result<()> {
        const SIGKILL: u32 = libc::SIGKILL as u32;
        const SIGTERM: u32 = libc::SIGTERM as u32;
        if exec_id.is_empty() && signal == SIGKILL {
            return self.kill_all();
        }
        let process = self.process(exec_id)?;
        let is_init = Arc::ptr_eq(&process, &self.init);
        let signal = if is_init && signal == SIGTERM && process.ignores(signal) { SIGKILL } else { signal };
        process.signal(signal)
    }

    fn kill_all(&self) -> Result<()> {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill()?;
        }
        // Also without a group: the first process takes its pid namespace with it.
        let processes: Vec<_> = self.lock_processes().by_id.values().cloned().collect();
        processes.iter().try_for_each(|process| process.signal(libc::SIGKILL as u32))
    }

    /// Kill everything in it and give up its group. Storages stay with the caller.
    pub fn destroy(&self, at_most: Option<Duration>) -> Result<()> {
        let started = Instant::now();
        let at_most = at_most.unwrap_or(KERNEL_LIMIT);
        self.kill_all()?;
        let processes: Vec<_> = self.lock_processes().by_id.values().cloned().collect();
        for process in processes {
            let left = at_most.saturating_sub(started.elapsed());
            if !process.exit().wait_for(left) {
                let what = format!("the end of process {:?} of container {}", process.exec_id(), self.id);
                return Err(AgentError::TimedOut { what, after_ms: started.elapsed().as_millis() });
            }
        }
        remove_group(self.cgroup.as_ref());
        Ok(())
    }

    fn group(&self) -> Result<&Cgroup> {
        self.cgroup
            .as_ref()
            .ok_or_else(|| AgentError::Unsupported { what: "a container without a cgroup".to_owned() })
    }

    /// Stop all its processes for a while.
    pub fn pause(&self) -> Result<()> {
        let mut state = self.lock_state();
        if matches!(*state, State::Paused) {
            return Err(AgentError::WrongState {
                what: format!("container {}", self.id),
                state: state.name(),
            });
        }
        self.group()?.freeze(true, KERNEL_LIMIT)?;
        // Paused before its start it stays parked: the word to start comes after resuming.
        if matches!(*state, State::Running) {
            *state = State::Paused;
        }
        Ok(())
    }

    /// Let them go on.
    pub fn resume(&self) -> Result<()> {
        let mut state = self.lock_state();
        if !matches!(*state, State::Paused) {
            return Err(AgentError::WrongState {
                what: format!("container {}", self.id),
                state: state.name(),
            });
        }
        self.group()?.freeze(false, KERNEL_LIMIT)?;
        *state = State::Running;
        Ok(())
    }

    /// New limits.
    pub fn update(&self, resources: &grpc::LinuxResources) -> Result<()> {
        self.group()?.apply(resources)
    }

    /// What it has used.
    pub fn stats(&self) -> grpc::StatsContainerResponse {
        grpc::StatsContainerResponse {
            cgroup_stats: self.cgroup.as_ref().map(Cgroup::stats),
            network_stats: Vec::new(),
        }
    }
}

fn remove_group(cgroup: Option<&Cgroup>) {
    let Some(cgroup) = cgroup else { return };
    if let Err(error) = cgroup.kill().and_then(|()| cgroup.remove(KERNEL_LIMIT)) {
        log::warn!("{error}");
    }
}

/// Check a container's name: it becomes part of paths.
pub fn check_id(id: &str) -> Result<()> {
    let is_rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let bytes = id.as_bytes();
    if bytes.len() < 2 || !bytes[0].is_ascii_alphanumeric() || !bytes.iter().all(|byte| is_rest(*byte)) {
        let rule = "two or more of letters, digits, `.`, `-`, `_`, the first a letter or digit";
        return Err(AgentError::invalid("container_id", format!("`{id}`: {rule}")));
    }
    Ok(())
}

/// The errno that stands for a specification with a part missing.
pub fn missing(part: &'static str) -> AgentError {
    AgentError::system("create container without", part, Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_check_id_when_names_differ_then_only_safe_ones_pass() {
        for id in ["ab", "a1.b-c_d", "0x"] {
            check_id(id).expect(id);
        }
        for id in ["", "a", ".a", "-a", "a/b", "a b", "ä1", "a\0"] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
