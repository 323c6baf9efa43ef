//! The guest agent.
//!
//! As PID 1 it prepares the guest, tells the host that it is ready by connecting to it, and serves requests until the
//! sandbox is destroyed, which ends the guest. As another process (`--listen unix://PATH`) it serves the same requests on a
//! unix socket, for tests.

mod cgroup;
mod cmdline;
mod container;
mod device;
mod error;
mod init;
mod launch;
mod listen;
mod logger;
mod marks;
mod mount;
mod ordering;
mod process;
mod pump;
mod sandbox;
mod service;
mod spec;
mod storage;
mod stream;

use std::process::ExitCode;
use std::sync::Arc;

use log::LevelFilter;
use nix::sys::signal::{SigSet, Signal};

use crate::cgroup::CgroupRoot;
use crate::cmdline::Settings;
use crate::device::uevent::{DeviceEvents, load_for_present_devices};
use crate::error::{Context, Result};
use crate::init::modules::{MODULES_LIMIT, ModuleLoader};
use crate::launch::launcher::Launcher;
use crate::listen::NewHandler;
use crate::marks::mark;
use crate::sandbox::{Parts, Sandbox};
use crate::service::Service;

const USAGE: &str = "usage: casemate-agent [--version | --listen unix://PATH]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        // The kernel hands parameters that it does not know to its first process.
        _ if std::process::id() == 1 => run_as_init(),
        ["--version" | "-v"] => {
            println!("casemate-agent {} api {}", env!("CARGO_PKG_VERSION"), casemate_proto::API_VERSION);
            return ExitCode::SUCCESS;
        }
        ["--listen", address] if address.starts_with("unix://") => {
            run_as_process(&address["unix://".len()..])
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("agent can't go on: {error}");
            ExitCode::FAILURE
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        if let Err(error) = run() {
            log::error!("{error}");
        }
    });
    spawned.context("start thread", name).map(drop)
}

/// Give the calling thread the lowest share of the processor.
fn yield_to_others() {
    const LOWEST: libc::c_int = 19;
    // SAFETY: plain system calls without pointers; 0 means the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LOWEST) };
    if result != 0 {
        log::warn!("a thread keeps its priority: {}", std::io::Error::last_os_error());
    }
}

fn run_as_init() -> Result<()> {
    mark("init");
    logger::start(LevelFilter::Info);
    let module_directory = init::prepare_root()?;
    let cmdline = std::fs::read_to_string("/proc/cmdline").context("read", "/proc/cmdline")?;
    let settings = Settings::parse(&cmdline)?;
    log::set_max_level(settings.log_level);
    if settings.wants_cgroup_v1 {
        log::warn!("cgroup version 1 is not served: version 2 is used");
    }
    // From here on threads are allowed.
    let launcher = Launcher::fork()?;
    mark("launcher");
    block_signals()?;
    let modules = module_directory.map_or_else(|| Ok(ModuleLoader::none()), ModuleLoader::open)?;
    let events = DeviceEvents::listen(modules.clone())?;
    modules.start()?;
    mark("modules_begin");
    let for_devices = modules.clone();
    spawn("devices", move || {
        // Nobody waits for these drivers; the first container must not wait behind them either.
        yield_to_others();
        for_devices.wait(MODULES_LIMIT)?;
        load_for_present_devices(&for_devices)
    })?;
    init::bring_up_loopback()?;
    init::set_default_hostname()?;
    let cgroups = CgroupRoot::find();
    if let Some(root) = cgroups.clone() {
        spawn("cgroups", move || root.enable_controllers())?;
    }
    let host_port = settings.host_port;
    let parts = Parts { settings, launcher, cgroups, events, modules: modules.clone(), is_init: true };
    let sandbox = Sandbox::new(parts);
    let new_handler = new_handler(&sandbox, Arc::new(|| init::power::power_off()));
    if let Some(port) = host_port {
        let (modules, new_handler) = (modules.clone(), Arc::clone(&new_handler));
        spawn("host", move || listen::serve_host(port, &modules, &new_handler))?;
    }
    spawn("listener", move || listen::serve_vsock(&modules, &new_handler))?;
    mark("serving");
    reap_for_ever(&sandbox)
}

fn run_as_process(path: &str) -> Result<()> {
    logger::start(LevelFilter::Debug);
    let launcher = Launcher::fork()?;
    block_signals()?;
    nix::sys::prctl::set_child_subreaper(true).context("prctl", "child subreaper")?;
    let sandbox = Sandbox::new(Parts {
        settings: Settings::default(),
        launcher,
        cgroups: CgroupRoot::find(),
        events: DeviceEvents::default(),
        modules: ModuleLoader::none(),
        is_init: false,
    });
    // The end of the launcher ends the reaper, and that this process: nothing is left unreaped.
    let ended = Arc::downgrade(&sandbox);
    let new_handler = new_handler(
        &sandbox,
        Arc::new(move || {
            if let Some(sandbox) = ended.upgrade() {
                sandbox.parts.launcher.end();
            }
        }),
    );
    let path = path.to_owned();
    spawn("listener", move || listen::serve_unix(&path, &new_handler))?;
    reap_for_ever(&sandbox)
}

fn new_handler(sandbox: &Arc<Sandbox>, shutdown: Arc<dyn Fn() + Send + Sync>) -> NewHandler {
    let sandbox = Arc::clone(sandbox);
    Arc::new(move || Service::handler(Arc::clone(&sandbox), Arc::clone(&shutdown)))
}

fn awaited_signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGTERM].into_iter().collect()
}

/// For this thread and those it makes; the reaper takes them one by one.
fn block_signals() -> Result<()> {
    awaited_signals().thread_block().context("block", "signals")
}

fn reap_for_ever(sandbox: &Sandbox) -> Result<()> {
    loop {
        match awaited_signals().wait() {
            Ok(Signal::SIGTERM) if !sandbox.parts.is_init => return Ok(()),
            Ok(_) => {}
            Err(errno) => return Err(error::AgentError::system("wait for", "signals", errno)),
        }
        let launcher = &sandbox.parts.launcher;
        if sandbox.children.reap().contains(&launcher.pid()) {
            if launcher.is_over() {
                return Ok(());
            }
            return Err(error::AgentError::ChildGone { context: "launcher ended" });
        }
    }
}
