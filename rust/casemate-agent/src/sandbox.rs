//! The sandbox: everything that the agent holds.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use casemate_proto::grpc;
use nix::unistd::sethostname;

use crate::cgroup::{Cgroup, CgroupRoot, relative_path};
use crate::cmdline::Settings;
use crate::container::{Container, Makers, NewContainer, check_id, missing};
use crate::device::uevent::DeviceEvents;
use crate::error::{AgentError, Context, Result};
use crate::init::modules::{MODULES_LIMIT, ModuleLoader};
use crate::launch::launcher::Launcher;
use crate::marks::mark;
use crate::mount::{MountOptions, mount_with};
use crate::process::{Children, Process};
use crate::spec;
use crate::storage::{StorageContext, Storages};

/// What the agent was started with.
#[derive(Debug)]
pub struct Parts {
    /// Settings from the kernel command line.
    pub settings: Settings,
    /// Makes processes.
    pub launcher: Launcher,
    /// Where groups are made.
    pub cgroups: Option<CgroupRoot>,
    /// Tells of devices.
    pub events: DeviceEvents,
    /// How far the modules are.
    pub modules: ModuleLoader,
    /// Whether the agent is the guest's first process.
    pub is_init: bool,
}

#[derive(Debug, Default)]
struct Known {
    is_created: bool,
    is_over: bool,
    id: String,
    mount_points: Vec<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Sandbox {
    /// What the agent was started with.
    pub parts: Parts,
    /// Processes to be reaped.
    pub children: Children,
    storages: Storages,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// The first container's first process: its pid namespace is the one that containers can share.
    pid_namespace_of: Mutex<Option<Arc<Process>>>,
    known: Mutex<Known>,
}

impl Sandbox {
    /// An empty sandbox.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            children: Children::default(),
            storages: Storages::default(),
            containers: Mutex::default(),
            pid_namespace_of: Mutex::default(),
            known: Mutex::default(),
        })
    }

    fn lock_known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn makers(&self) -> Makers<'_> {
        Makers {
            launcher: &self.parts.launcher,
            children: &self.children,
            pipe_size_bytes: self.parts.settings.pipe_size_bytes,
        }
    }

    fn storage_context<'a>(&'a self, container_id: &'a str) -> StorageContext<'a> {
        StorageContext {
            container_id,
            events: &self.parts.events,
            modules: &self.parts.modules,
            hotplug_timeout: self.parts.settings.hotplug_timeout,
        }
    }

    /// CreateSandbox.
    pub fn create(&self, request: &grpc::CreateSandboxRequest) -> Result<()> {
        let mut known = self.lock_known();
        if known.is_created {
            return Err(AgentError::Exists { what: "sandbox", id: known.id.clone() });
        }
        if !request.sandbox_id.is_empty() {
            check_id(&request.sandbox_id)?;
        }
        request.kernel_modules.iter().try_for_each(|module| load_module(&self.parts.modules, module))?;
        if self.parts.is_init && !request.hostname.is_empty() {
            sethostname(&request.hostname).context("sethostname", &request.hostname)?;
        }
        if !request.storages.is_empty() {
            self.parts.modules.wait(MODULES_LIMIT)?;
        }
        let mount_points = self.storages.add_all(&request.storages, &self.storage_context(""))?;
        if self.parts.is_init && !request.dns.is_empty() {
            set_dns(&request.dns)?;
        }
        known.is_created = true;
        known.id.clone_from(&request.sandbox_id);
        known.mount_points = mount_points;
        mark("sandbox");
        Ok(())
    }

    /// DestroySandbox, up to the end of the guest itself.
    pub fn destroy(&self) -> Result<()> {
        let mount_points = {
            let mut known = self.lock_known();
            if known.is_over {
                return Err(AgentError::WrongState { what: "sandbox".to_owned(), state: "destroyed" });
            }
            known.is_over = true;
            std::mem::take(&mut known.mount_points)
        };
        let containers: Vec<_> = self.lock_containers().drain().map(|(_, container)| container).collect();
        let mut first_failure = None;
        for container in containers {
            if let Err(error) = container.destroy(None) {
                log::error!("{error}");
                first_failure.get_or_insert(error);
            }
            self.storages.release_all(container.mount_points());
        }
        self.storages.release_all(&mount_points);
        first_failure.map_or(Ok(()), Err)
    }

    /// A container by its name, for requests about its processes.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.lock_containers()
            .get(id)
            .cloned()
            .ok_or_else(|| AgentError::UnknownContainer { id: id.to_owned() })
    }

    /// A process by the names of its container and its own.
    pub fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>> {
        self.container(container_id)?.process(exec_id)
    }

    /// CreateContainer.
    pub fn create_container(&self, request: grpc::CreateContainerRequest) -> Result<()> {
        let id = request.container_id;
        check_id(&id)?;
        if self.lock_containers().contains_key(&id) {
            return Err(AgentError::Exists { what: "container", id });
        }
        {
            let known = self.lock_known();
            if !known.is_created || known.is_over {
                return Err(AgentError::WrongState { what: "sandbox".to_owned(), state: "not created" });
            }
        }
        let spec = request.oci.ok_or_else(|| missing("OCI"))?;
        spec::check(&spec)?;
        let ports = [request.stdin_port, request.stdout_port, request.stderr_port];
        refuse(ports != [0; 3], "stream ports")?;
        refuse(!request.shared_mounts.is_empty(), "shared_mounts")?;
        refuse(!request.devices.is_empty(), "devices")?;
        let pid_namespace_of = if request.sandbox_pidns { self.shared_pid_namespace()? } else { None };

        self.parts.modules.wait(MODULES_LIMIT)?;
        mark("container_begin");
        let mount_points = self.storages.add_all(&request.storages, &self.storage_context(&id))?;
        mark("container_storages");
        let exec_id = if request.exec_id.is_empty() { id.clone() } else { request.exec_id };
        let made = self.make_container(&id, exec_id, spec, pid_namespace_of, mount_points.clone());
        let container = made.inspect_err(|_| self.storages.release_all(&mount_points))?;
        mark("container_created");
        let mut first = self.pid_namespace_of.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| Arc::clone(container.init()));
        self.lock_containers().insert(id, container);
        Ok(())
    }

    fn make_container(
        &self,
        id: &str,
        exec_id: String,
        spec: grpc::Spec,
        pid_namespace_of: Option<Arc<Process>>,
        mount_points: Vec<String>,
    ) -> Result<Arc<Container>> {
        let linux = spec.linux.clone().unwrap_or_default();
        let path = relative_path(&linux.cgroups_path, id)?;
        let resources = linux.resources.unwrap_or_default();
        let cgroup =
            self.parts.cgroups.as_ref().map(|root| Cgroup::create(root, &path, &resources)).transpose()?;
        mark("container_cgroup");
        let new = NewContainer { id: id.to_owned(), exec_id, spec, cgroup, pid_namespace_of, mount_points };
        Container::create(new, &self.makers())
    }

    fn shared_pid_namespace(&self) -> Result<Option<Arc<Process>>> {
        let first = self.pid_namespace_of.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if first.is_none() && !self.lock_containers().is_empty() {
            let what = "Sandbox does not have sandbox_pidns: it".to_owned();
            return Err(AgentError::Unsupported { what });
        }
        Ok(first)
    }

    /// StartContainer.
    pub fn start_container(&self, request: &grpc::StartContainerRequest) -> Result<()> {
        self.life_cycle_container(&request.container_id)?.start()?;
        mark("container_started");
        Ok(())
    }

    /// RemoveContainer.
    pub fn remove_container(&self, request: &grpc::RemoveContainerRequest) -> Result<()> {
        let id = &request.container_id;
        let container = self.life_cycle_container(id)?;
        let at_most = (request.timeout > 0).then(|| Duration::from_secs(request.timeout.into()));
        container.destroy(at_most)?;
        self.lock_containers().remove(id);
        self.storages.release_all(container.mount_points());
        match fs::remove_dir_all(Path::new("/run/kata-containers").join(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                log::warn!("directory of {id} stays: {error}")
            }
            _ => {}
        }
        Ok(())
    }

    /// Callers know an unknown container here as an internal error.
    fn life_cycle_container(&self, id: &str) -> Result<Arc<Container>> {
        self.lock_containers()
            .get(id)
            .cloned()
            .ok_or_else(|| AgentError::NoSuchContainer { id: id.to_owned() })
    }

    /// ExecProcess.
    pub fn exec(&self, request: grpc::ExecProcessRequest) -> Result<()> {
        let process = request.process.ok_or_else(|| missing("process"))?;
        spec::check_process(&process)?;
        let ports = [request.stdin_port, request.stdout_port, request.stderr_port];
        refuse(ports != [0; 3], "stream ports")?;
        self.container(&request.container_id)?.exec(&request.exec_id, process, &self.makers())
    }
}

fn refuse(given: bool, what: &str) -> Result<()> {
    if given { Err(AgentError::Unsupported { what: what.to_owned() }) } else { Ok(()) }
}

/// A module that a sandbox wants comes from the initrd; parameters need a tool that the guest does not have.
fn load_module(modules: &ModuleLoader, module: &grpc::KernelModule) -> Result<()> {
    if module.name.is_empty() || module.name.contains('/') {
        return Err(AgentError::invalid("kernel_modules", format!("`{}` is no module's name", module.name)));
    }
    modules.wait(MODULES_LIMIT)?;
    modules.load_on_demand(&module.name)?;
    let is_loaded = Path::new("/sys/module").join(module.name.replace('-', "_")).exists();
    refuse(!is_loaded || !module.parameters.is_empty(), &format!("loading of kernel module {}", module.name))
}

/// Put name servers where containers' mounts find them.
fn set_dns(lines: &[String]) -> Result<()> {
    const TARGET: &str = "/etc/resolv.conf";
    const FILE: &str = "/run/kata-containers/sandbox/resolv.conf";
    if !Path::new(TARGET).exists() {
        return Ok(());
    }
    let text: String = lines.iter().map(|line| format!("{}\n", line.trim())).collect();
    fs::create_dir_all("/run/kata-containers/sandbox").context("mkdir", "/run/kata-containers/sandbox")?;
    fs::write(FILE, text).context("write", FILE)?;
    mount_with(FILE, TARGET, "bind", &MountOptions::parse(&["bind"])?)
}
