//! Loading of the kernel modules that the initrd carries.
//!
//! `/lib/casemate/modules.list` has one line a module: its file name below `/lib/casemate/modules/`, white space, and the
//! file names it depends on, separated by commas, or `-`. A module stands after those it depends on; the order is also the
//! order of importance, since what can be loaded is loaded in it. Files are not compressed. `/lib/casemate/modules.demand` has
//! the same form; its modules are loaded when a device or a storage asks for one.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use crate::error::{AgentError, Context, Result};
use crate::marks::mark;

/// Longest that the modules of the initrd may take.
pub const MODULES_LIMIT: Duration = Duration::from_secs(60);

const DIRECTORY: &str = "/lib/casemate";
/// More threads than CPUs pay: module initialisation waits for the kernel a lot.
const MAX_THREADS: usize = 3;

/// Modules and what each waits for, by index.
#[derive(Debug, PartialEq, Eq)]
pub struct ModulePlan {
    names: Vec<String>,
    needs: Vec<Vec<usize>>,
}

impl ModulePlan {
    /// Read a list whose modules may depend on those of `loaded` as well.
    ///
    /// # Errors
    /// Names the line that is malformed or depends on a module that does not come before it.
    pub fn parse(text: &str, loaded: &Self) -> Result<Self> {
        let mut plan = Self { names: Vec::new(), needs: Vec::new() };
        let mut index_of: HashMap<&str, usize> = HashMap::new();
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        for line in lines {
            let mut words = line.split_ascii_whitespace();
            let (Some(name), Some(needs), None) = (words.next(), words.next(), words.next()) else {
                return Err(AgentError::invalid(
                    "modules.list",
                    format!("`{line}` is not `<file> <files or ->`"),
                ));
            };
            if name.contains('/') || index_of.contains_key(name) {
                return Err(AgentError::invalid(
                    "modules.list",
                    format!("`{name}` is a path or stands twice"),
                ));
            }
            let is_loaded = |need: &str| need == "-" || loaded.names.iter().any(|name| name == need);
            let needs = needs.split(',').filter(|need| !is_loaded(need)).map(|need| {
                index_of.get(need).copied().ok_or_else(|| {
                    AgentError::invalid(
                        "modules.list",
                        format!("`{name}` needs `{need}`, which does not come before it"),
                    )
                })
            });
            plan.needs.push(needs.collect::<Result<_>>()?);
            index_of.insert(name, plan.names.len());
            plan.names.push(name.to_owned());
        }
        Ok(plan)
    }

    fn empty() -> Self {
        Self { names: Vec::new(), needs: Vec::new() }
    }

    /// What to load for the module called `name`, in order; nothing when it is not in the list.
    fn closure_of(&self, name: &str) -> Vec<&str> {
        let plain = |name: &str| name.trim_end_matches(".ko").replace('-', "_");
        let Some(wanted) = self.names.iter().position(|file| plain(file) == plain(name)) else {
            return Vec::new();
        };
        let mut is_wanted = vec![false; self.names.len()];
        is_wanted[wanted] = true;
        // What a module needs stands before it.
        for index in (0..=wanted).rev() {
            if is_wanted[index] {
                self.needs[index].iter().for_each(|need| is_wanted[*need] = true);
            }
        }
        self.names
            .iter()
            .zip(is_wanted)
            .filter(|(_, is_wanted)| *is_wanted)
            .map(|(name, _)| name.as_str())
            .collect()
    }
}

/// The initrd's directory of modules.
#[derive(Debug)]
pub struct ModuleDirectory(OwnedFd);

impl ModuleDirectory {
    /// None when the guest has no modules of ours.
    pub fn open() -> Option<Self> {
        open(DIRECTORY, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).ok().map(Self)
    }

    fn open_file(&self, path: &str) -> Result<File> {
        let fd = openat(&self.0, path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        Ok(fd.context("open", format!("{DIRECTORY}/{path}"))?.into())
    }

    fn read(&self, list: &'static str, loaded: &ModulePlan) -> Result<ModulePlan> {
        let mut text = String::new();
        self.open_file(list)?.read_to_string(&mut text).context("read", list)?;
        ModulePlan::parse(&text, loaded)
    }

    fn load(&self, name: &str) -> Result<()> {
        let file = self.open_file(&format!("modules/{name}"))?;
        // SAFETY: an open descriptor, a NUL-terminated parameter string, no flags; the kernel keeps neither.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        match Errno::result(result) {
            // It is built into the kernel or was loaded before.
            Ok(_) | Err(Errno::EEXIST) => Ok(()),
            Err(errno) => Err(AgentError::system("load module", name, errno)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    Loading,
    Done,
}

#[derive(Debug)]
struct State {
    progress: Vec<Progress>,
}

impl State {
    fn is_complete(&self) -> bool {
        self.progress.iter().all(|progress| *progress == Progress::Done)
    }
}

/// How far the loading is. Clones share it.
#[derive(Clone, Debug)]
pub struct ModuleLoader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    directory: Option<ModuleDirectory>,
    plan: ModulePlan,
    demand: ModulePlan,
    state: Mutex<State>,
    changed: Condvar,
}

impl ModuleLoader {
    /// Nothing to load.
    pub fn none() -> Self {
        Self::new(None, ModulePlan::empty(), ModulePlan::empty())
    }

    /// Read the lists; nothing is loaded yet. A guest without the list of modules on demand has none.
    pub fn open(directory: ModuleDirectory) -> Result<Self> {
        let plan = directory.read("modules.list", &ModulePlan::empty())?;
        let demand = match directory.read("modules.demand", &plan) {
            Err(AgentError::System { errno: Errno::ENOENT, .. }) => ModulePlan::empty(),
            other => other?,
        };
        Ok(Self::new(Some(directory), plan, demand))
    }

    fn new(directory: Option<ModuleDirectory>, plan: ModulePlan, demand: ModulePlan) -> Self {
        let state = State { progress: vec![Progress::Waiting; plan.names.len()] };
        Self(Arc::new(Inner { directory, plan, demand, state: Mutex::new(state), changed: Condvar::new() }))
    }

    /// Start loading what is always loaded, in threads of its own.
    pub fn start(&self) -> Result<()> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        for number in 0..MAX_THREADS.min(cpus + 1).min(self.0.plan.names.len()) {
            let loader = self.clone();
            std::thread::Builder::new()
                .name(format!("modules-{number}"))
                .spawn(move || loader.work(&|name| loader.load(name)))
                .context("start thread", "modules")?;
        }
        Ok(())
    }

    fn load(&self, name: &str) -> Result<()> {
        self.0.directory.as_ref().map_or(Ok(()), |directory| directory.load(name))
    }

    /// Load the module called `name` and what it needs, when the initrd has it for this.
    pub fn load_on_demand(&self, name: &str) -> Result<()> {
        self.0.demand.closure_of(name).iter().try_for_each(|file| self.load(file))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Load whatever is ready until nothing is left. A module that fails holds nothing up: those that need it fail in turn.
    fn work(&self, load: &dyn Fn(&str) -> Result<()>) {
        let mut state = self.lock();
        loop {
            let plan = &self.0.plan;
            let is_ready = |index: &usize| {
                state.progress[*index] == Progress::Waiting
                    && plan.needs[*index].iter().all(|need| state.progress[*need] == Progress::Done)
            };
            let Some(index) = (0..plan.names.len()).find(is_ready) else {
                if !state.progress.contains(&Progress::Waiting) {
                    return;
                }
                state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.progress[index] = Progress::Loading;
            drop(state);
            let result = load(&plan.names[index]);
            state = self.lock();
            state.progress[index] = Progress::Done;
            if let Err(error) = result {
                log::error!("{error}");
            }
            if state.is_complete() {
                mark("modules");
            }
            self.0.changed.notify_all();
        }
    }

    /// Wait until a module has been loaded since the call, all are, or `at_most` has passed; whether all are.
    pub fn wait_for_change(&self, at_most: Duration) -> bool {
        let state = self.lock();
        if state.is_complete() {
            drop(state);
            std::thread::sleep(at_most);
            return true;
        }
        self.0.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0.is_complete()
    }

    /// Wait until all modules are loaded or have failed, which the log says: what needed one will fail and say so.
    ///
    /// # Errors
    /// Not done within `at_most`.
    pub fn wait(&self, at_most: Duration) -> Result<()> {
        let started = Instant::now();
        let state = self.lock();
        let waited = self.0.changed.wait_timeout_while(state, at_most, |state| !state.is_complete());
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            let after_ms = started.elapsed().as_millis();
            return Err(AgentError::TimedOut { what: "kernel modules".to_owned(), after_ms });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# vsock first\nvirtio.ko -\nvirtio_ring.ko virtio.ko\nvsock.ko -\n\nvirtio_blk.ko virtio.ko,virtio_ring.ko\n";

    fn parse(text: &str) -> Result<ModulePlan> {
        ModulePlan::parse(text, &ModulePlan::empty())
    }

    fn loader(text: &str) -> ModuleLoader {
        ModuleLoader::new(None, parse(text).expect("parses"), ModulePlan::empty())
    }

    #[test]
    fn test_closure_when_module_is_wanted_then_its_needs_before_it_and_no_others() {
        let loaded = parse(LIST).expect("parses");
        let text = "failover.ko -\nnet_failover.ko failover.ko\nother.ko -\nvirtio-net.ko virtio.ko,net_failover.ko\n";
        let demand = ModulePlan::parse(text, &loaded).expect("parses");
        assert_eq!(demand.closure_of("virtio_net"), ["failover.ko", "net_failover.ko", "virtio-net.ko"]);
        assert_eq!(demand.closure_of("absent"), [""; 0]);
        assert!(parse(text).is_err(), "virtio.ko is of the other list");
    }

    #[test]
    fn test_parse_when_list_is_right_then_dependencies_by_index() {
        let plan = parse(LIST).expect("parses");
        assert_eq!(plan.names, ["virtio.ko", "virtio_ring.ko", "vsock.ko", "virtio_blk.ko"]);
        assert_eq!(plan.needs, [vec![], vec![0], vec![], vec![0, 1]]);
    }

    #[test]
    fn test_parse_when_list_is_wrong_then_refused() {
        for text in ["a.ko", "a.ko - b", "a.ko b.ko\nb.ko -", "a.ko -\na.ko -", "../a.ko -"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn test_work_when_two_threads_load_then_each_after_its_needs_and_once() {
        let loader = loader(LIST);
        let loaded = Mutex::new(Vec::new());
        let load = |name: &str| {
            loaded.lock().expect("no panic").push(name.to_owned());
            Ok(())
        };
        std::thread::scope(|scope| {
            scope.spawn(|| loader.work(&load));
            scope.spawn(|| loader.work(&load));
        });
        let loaded = loaded.into_inner().expect("no panic");
        let place = |name: &str| loaded.iter().position(|loaded| loaded == name).expect("loaded");
        assert_eq!(loaded.len(), 4);
        assert!(
            place("virtio.ko") < place("virtio_ring.ko") && place("virtio_ring.ko") < place("virtio_blk.ko")
        );
        loader.wait(Duration::ZERO).expect("complete");
    }

    #[test]
    fn test_wait_when_a_module_fails_then_the_others_are_loaded() {
        let loader = loader("a.ko -\nb.ko a.ko");
        assert!(matches!(loader.wait(Duration::ZERO), Err(AgentError::TimedOut { .. })));
        loader.work(&|name| Err(AgentError::system("load module", name, Errno::ENOEXEC)));
        loader.wait(Duration::ZERO).expect("nothing is left");
    }
}
