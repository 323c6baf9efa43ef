//! A child from its birth to its program.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::OwnedFd;

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, setsid};

use crate::launch::launcher::exit_now;
use crate::launch::rootfs::Rootfs;
use crate::launch::status::{ChildEnd, Step, StepError};
use crate::launch::terminal::Terminal;
use crate::launch::{Plan, devices, executable, identity};

type Result<T> = std::result::Result<T, StepError>;

/// Become what the plan says, or report why not. Does not return.
pub fn run(mut status: ChildEnd, join: Option<OwnedFd>, stdio: Option<[OwnedFd; 3]>) -> ! {
    let Some(plan) = status.read_plan() else { exit_now(1) };
    let Err(error) = become_program(&plan, &mut status, join, stdio);
    status.send_error(&error);
    exit_now(1);
}

fn become_program(
    plan: &Plan,
    status: &mut ChildEnd,
    join: Option<OwnedFd>,
    stdio: Option<[OwnedFd; 3]>,
) -> Result<Infallible> {
    let missing = |field: &str| StepError::new("read plan", field, Errno::EINVAL);
    let spec = plan.spec.as_ref().ok_or_else(|| missing("OCI"))?;
    let process = plan.process.as_ref().ok_or_else(|| missing("Process"))?;

    reset_signals()?;
    close_others_on_exec()?;
    identity::apply_limits(process)?;
    setsid().step("setsid", "")?;
    if plan.is_exec {
        let join = join.ok_or_else(|| missing("namespaces"))?;
        join_namespaces(&join)?;
    } else {
        build_root(spec, process)?;
    }
    let terminal = process.terminal.then(|| Terminal::open(process)).transpose()?;
    if let (Some(terminal), false) = (&terminal, plan.is_exec) {
        terminal.bind_console()?;
    }
    let master = take_stdio(terminal, stdio)?;
    if !plan.is_exec {
        finish_root(spec)?;
    }
    umask(Mode::from_bits_truncate(process_umask()));
    let user = identity::resolve_user(process)?;
    enter_directory(&process.cwd)?;
    identity::become_user(process, &user)?;

    let environment = identity::environment(process, user.uid);
    let program = executable::find(process, &environment)?;
    let arguments: Vec<CString> = process.args.iter().map(|text| c_string(text)).collect::<Result<_>>()?;
    let environment: Vec<CString> = environment.iter().map(|text| c_string(text)).collect::<Result<_>>()?;
    if !status.send_ready(master.as_ref()) || (!plan.is_exec && !status.wait_for_start()) {
        exit_now(1);
    }
    execve(&c_string(&program)?, &arguments, &environment).step("exec", &program)
}

const fn process_umask() -> libc::mode_t {
    0o022
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| StepError::new("read plan", "text with a NUL byte", Errno::EINVAL))
}

/// What the agent ignores or blocks must not reach the program.
fn reset_signals() -> Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of ours.
    unsafe { sigaction(Signal::SIGPIPE, &default) }.step("reset", "SIGPIPE")?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).step("reset", "signal mask")
}

/// Whatever this process inherited, the program gets its three descriptors and no others.
fn close_others_on_exec() -> Result<()> {
    const CLOSE_ON_EXEC: libc::c_uint = 4;
    // SAFETY: three numbers; nothing is closed now.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, CLOSE_ON_EXEC) };
    Errno::result(result).map(drop).step("close_range", "inherited descriptors")
}

/// Enter the container of the process behind a pidfd; its pid namespace was entered by birth.
fn join_namespaces(pidfd: &OwnedFd) -> Result<()> {
    // Until the program runs, nothing in the container may look into this process.
    nix::sys::prctl::set_dumpable(false).step("prctl", "non-dumpable")?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    setns(pidfd, namespaces).step("setns", "container")
}

fn build_root(spec: &grpc::Spec, process: &grpc::Process) -> Result<()> {
    let linux = spec.linux.clone().unwrap_or_default();
    // After the child has come into its cgroup, so that this is the namespace's root.
    unshare(CloneFlags::CLONE_NEWCGROUP).step("unshare", "cgroup namespace")?;
    umask(Mode::empty());
    let root = Rootfs::prepare(spec, &linux)?;
    for mount in &spec.mounts {
        root.mount(mount)?;
    }
    if root.has_own_dev(&spec.mounts) {
        devices::create(&root, &linux.devices)?;
    }
    root.apply_sysctls(&linux)?;
    root.make_directory(&process.cwd)?;
    root.pivot()
}

fn finish_root(spec: &grpc::Spec) -> Result<()> {
    let linux = spec.linux.clone().unwrap_or_default();
    Rootfs::finish(spec, &linux)
}

/// Put the terminal or the pipes on descriptors 0 to 2; the terminal's other side, to be handed over.
fn take_stdio(terminal: Option<Terminal>, stdio: Option<[OwnedFd; 3]>) -> Result<Option<OwnedFd>> {
    match (terminal, stdio) {
        (Some(terminal), _) => terminal.take_over().map(Some),
        (None, Some([stdin, stdout, stderr])) => {
            dup2_stdin(stdin).step("dup", "stdin")?;
            dup2_stdout(stdout).step("dup", "stdout")?;
            dup2_stderr(stderr).step("dup", "stderr")?;
            Ok(None)
        }
        (None, None) => Err(StepError::new("read plan", "stdio", Errno::EINVAL)),
    }
}

fn enter_directory(path: &str) -> Result<()> {
    let path = if path.is_empty() { "/" } else { path };
    chdir(path).step("chdir", path)?;
    // Outside of the root, by a magic link, there is no name for where we are.
    let here = nix::unistd::getcwd().step("getcwd", path)?;
    if here.starts_with("/") { Ok(()) } else { Err(StepError::new("getcwd", path, Errno::ENOENT)) }
}
