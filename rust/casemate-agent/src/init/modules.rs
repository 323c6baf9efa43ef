//! Loading of the kernel modules that the initrd carries.
//!
//! `/lib/casemate/modules.list` has one line a module: its file name below `/lib/casemate/modules/`, white space, and the
//! file names it depends on, separated by commas, or `-`. A module stands after those it depends on; the order is also the
//! order of importance, since what can be loaded is loaded in it. Files are not compressed.

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
    /// Read the list.
    ///
    /// # Errors
    /// Names the line that is malformed or depends on a module that does not come before it.
    pub fn parse(text: &str) -> Result<Self> {
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
            let needs = needs.split(',').filter(|need| *need != "-").map(|need| {
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

    fn plan(&self) -> Result<ModulePlan> {
        let mut text = String::new();
        self.open_file("modules.list")?.read_to_string(&mut text).context("read", "modules.list")?;
        ModulePlan::parse(&text)
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
    plan: ModulePlan,
    state: Mutex<State>,
    changed: Condvar,
}

impl ModuleLoader {
    /// Nothing to load.
    pub fn none() -> Self {
        Self::new(ModulePlan { names: Vec::new(), needs: Vec::new() })
    }

    fn new(plan: ModulePlan) -> Self {
        let state = State { progress: vec![Progress::Waiting; plan.names.len()] };
        Self(Arc::new(Inner { plan, state: Mutex::new(state), changed: Condvar::new() }))
    }

    /// Start loading in threads of its own.
    pub fn start(directory: ModuleDirectory) -> Result<Self> {
        let loader = Self::new(directory.plan()?);
        let directory = Arc::new(directory);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        for number in 0..MAX_THREADS.min(cpus + 1).min(loader.0.plan.names.len()) {
            let (loader, directory) = (loader.clone(), Arc::clone(&directory));
            std::thread::Builder::new()
                .name(format!("modules-{number}"))
                .spawn(move || loader.work(&|name| directory.load(name)))
                .context("start thread", "modules")?;
        }
        Ok(loader)
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

    #[test]
    fn test_parse_when_list_is_right_then_dependencies_by_index() {
        let plan = ModulePlan::parse(LIST).expect("parses");
        assert_eq!(plan.names, ["virtio.ko", "virtio_ring.ko", "vsock.ko", "virtio_blk.ko"]);
        assert_eq!(plan.needs, [vec![], vec![0], vec![], vec![0, 1]]);
    }

    #[test]
    fn test_parse_when_list_is_wrong_then_refused() {
        for text in ["a.ko", "a.ko - b", "a.ko b.ko\nb.ko -", "a.ko -\na.ko -", "../a.ko -"] {
            assert!(ModulePlan::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn test_work_when_two_threads_load_then_each_after_its_needs_and_once() {
        let loader = ModuleLoader::new(ModulePlan::parse(LIST).expect("parses"));
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
        let loader = ModuleLoader::new(ModulePlan::parse("a.ko -\nb.ko a.ko").expect("parses"));
        assert!(matches!(loader.wait(Duration::ZERO), Err(AgentError::TimedOut { .. })));
        loader.work(&|name| Err(AgentError::system("load module", name, Errno::ENOEXEC)));
        loader.wait(Duration::ZERO).expect("nothing is left");
    }
}
