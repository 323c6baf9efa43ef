//! The cgroup (version 2) of a container. Source: kernel `admin-guide/cgroup-v2`.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::error::{AgentError, Context, Result};

/// Controllers that every container gets, as far as the kernel has them: they count what it uses. Others come with the first limit that
/// needs them, since each makes every group dearer.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Where the guest's hierarchy is mounted.
#[derive(Clone, Debug)]
pub struct CgroupRoot(PathBuf);

impl CgroupRoot {
    /// The mounted hierarchy, also where it stands beside version 1.
    pub fn find() -> Option<Self> {
        ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .into_iter()
            .find(|path| statfs(*path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC))
            .map(|path| Self(path.into()))
    }

    /// Let the children of the root have controllers. Done early: it waits for the kernel.
    pub fn enable_controllers(&self) -> Result<()> {
        enable_controllers(&self.0, &CONTROLLERS)
    }
}

/// Let the children of `directory` have the controllers `names`, as far as the kernel has them.
fn enable_controllers(directory: &Path, names: &[&str]) -> Result<()> {
    let available = read(directory, "cgroup.controllers")?;
    let enabled = read(directory, "cgroup.subtree_control")?;
    let is_in = |list: &str, name: &str| list.split_whitespace().any(|found| found == name);
    let wanted: Vec<String> = names
        .iter()
        .filter(|name| is_in(&available, name) && !is_in(&enabled, name))
        .map(|name| format!("+{name}"))
        .collect();
    if wanted.is_empty() { Ok(()) } else { write(directory, "cgroup.subtree_control", &wanted.join(" ")) }
}

fn read(directory: &Path, file: &str) -> Result<String> {
    let path = directory.join(file);
    fs::read_to_string(&path).context("read", path.to_string_lossy())
}

fn write(directory: &Path, file: &str, value: &str) -> Result<()> {
    let path = directory.join(file);
    fs::write(&path, value)
        .map_err(|error| AgentError::io("write", format!("{value} to {}", path.display()), &error))
}

/// The path below the hierarchy's root: colons of the systemd form become slashes, nothing stands for the container's id.
pub fn relative_path(wanted: &str, container_id: &str) -> Result<PathBuf> {
    let text = wanted.replace(':', "/");
    let text = text.trim_matches('/');
    let text = if text.is_empty() { container_id } else { text };
    if text.split('/').any(|part| part == "..") {
        return Err(AgentError::invalid("CgroupsPath", format!("`{wanted}` climbs")));
    }
    Ok(text.split('/').filter(|part| !part.is_empty() && *part != ".").collect())
}

/// Files and values that a set of limits comes to, in the order to write them. Only values above zero count.
pub fn plan_limits(resources: &grpc::LinuxResources) -> Vec<(String, String)> {
    let mut plan = Vec::new();
    let mut add = |file: &str, value: String| plan.push((file.to_owned(), value));
    if let Some(cpu) = &resources.cpu {
        if cpu.shares > 0 {
            let shares = cpu.shares.clamp(2, 262_144);
            add("cpu.weight", (1 + (shares - 2) * 9999 / 262_142).to_string());
        }
        let period = if cpu.period > 0 { cpu.period } else { 100_000 };
        if cpu.quota > 0 {
            add("cpu.max", format!("{} {period}", cpu.quota));
        } else if cpu.period > 0 {
            add("cpu.max", format!("max {period}"));
        }
        for (file, value) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
            if !value.is_empty() {
                add(file, value.clone());
            }
        }
    }
    if let Some(memory) = &resources.memory {
        if memory.reservation > 0 {
            add("memory.low", memory.reservation.to_string());
        }
        if memory.limit > 0 {
            add("memory.max", memory.limit.to_string());
        }
        // The protocol's number is memory and swap together, the kernel's is swap alone.
        if memory.swap > 0 && memory.swap >= memory.limit {
            add("memory.swap.max", (memory.swap - memory.limit.max(0)).to_string());
        }
    }
    if let Some(pids) = resources.pids.filter(|pids| pids.limit > 0) {
        add("pids.max", pids.limit.to_string());
    }
    for limit in &resources.hugepage_limits {
        add(&format!("hugetlb.{}.max", limit.pagesize), limit.limit.to_string());
    }
    if let Some(io) = &resources.block_io {
        let throttles = [
            ("rbps", &io.throttle_read_bps_device),
            ("wbps", &io.throttle_write_bps_device),
            ("riops", &io.throttle_read_iops_device),
            ("wiops", &io.throttle_write_iops_device),
        ];
        for (key, devices) in throttles {
            for device in devices {
                add("io.max", format!("{}:{} {key}={}", device.major, device.minor, device.rate));
            }
        }
    }
    plan
}

/// One container's group.
#[derive(Debug)]
pub struct Cgroup {
    root: PathBuf,
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Make the group with its limits, and the groups above it.
    pub fn create(root: &CgroupRoot, path: &Path, resources: &grpc::LinuxResources) -> Result<Self> {
        let mut directory = root.0.clone();
        for part in path {
            enable_controllers(&directory, &CONTROLLERS)?;
            directory.push(part);
            match fs::create_dir(&directory) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(AgentError::io("mkdir", directory.to_string_lossy(), &error));
                }
                _ => {}
            }
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let fd = open(&directory, flags, Mode::empty()).context("open", directory.to_string_lossy())?;
        let group = Self { root: root.0.clone(), path: directory, directory: fd };
        if let Err(error) = group.apply(resources) {
            if let Err(removal) = group.remove(Duration::ZERO) {
                log::warn!("{removal}");
            }
            return Err(error);
        }
        Ok(group)
    }

    /// The directory, for birth into the group.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Set limits.
    pub fn apply(&self, resources: &grpc::LinuxResources) -> Result<()> {
        for (file, value) in plan_limits(resources) {
            let controller = file.split('.').next().unwrap_or_default();
            if !CONTROLLERS.contains(&controller) {
                self.enable_above(controller)?;
            }
            write(&self.path, &file, &value)?;
        }
        Ok(())
    }

    /// Enable a controller in every group from the root down to the parent.
    fn enable_above(&self, controller: &str) -> Result<()> {
        let above: Vec<&Path> =
            self.path.ancestors().skip(1).take_while(|path| path.starts_with(&self.root)).collect();
        above.into_iter().rev().try_for_each(|directory| enable_controllers(directory, &[controller]))
    }

    /// Stop or continue all processes, and wait until they are.
    pub fn freeze(&self, frozen: bool, at_most: Duration) -> Result<()> {
        let digit = if frozen { "1" } else { "0" };
        write(&self.path, "cgroup.freeze", digit)?;
        self.wait_event("frozen", digit, at_most)
    }

    /// SIGKILL to every process in it.
    pub fn kill(&self) -> Result<()> {
        if self.path.join("cgroup.kill").exists() {
            return write(&self.path, "cgroup.kill", "1");
        }
        for pid in read(&self.path, "cgroup.procs")?.lines().filter_map(|line| line.parse().ok()) {
            match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(AgentError::system("kill", pid.to_string(), errno)),
            }
        }
        Ok(())
    }

    /// Wait until it has no process, then remove it.
    pub fn remove(&self, at_most: Duration) -> Result<()> {
        self.wait_event("populated", "0", at_most)?;
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(AgentError::io("rmdir", self.path.to_string_lossy(), &error))
            }
            _ => Ok(()),
        }
    }

    /// Wait until `cgroup.events` has `key value`; the kernel wakes a poller when the file changes.
    fn wait_event(&self, key: &str, value: &str, at_most: Duration) -> Result<()> {
        let started = Instant::now();
        let path = self.path.join("cgroup.events");
        loop {
            let file = fs::File::open(&path).context("open", path.to_string_lossy())?;
            let text = std::io::read_to_string(&file).context("read", path.to_string_lossy())?;
            let has = text.lines().any(|line| line.split_once(' ') == Some((key, value)));
            if has {
                return Ok(());
            }
            let left = at_most.saturating_sub(started.elapsed());
            if left.is_zero() {
                let what = format!("{key} {value} of {}", path.display());
                return Err(AgentError::TimedOut { what, after_ms: started.elapsed().as_millis() });
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(AgentError::system("poll", path.to_string_lossy(), errno)),
            }
        }
    }

    /// What the group has used; parts without a controller are absent.
    pub fn stats(&self) -> grpc::CgroupStats {
        let text = |file: &str| fs::read_to_string(self.path.join(file)).ok();
        let number = |file: &str| text(file).map(|text| number_or(&text, u64::MAX));
        let memory = number("memory.current").map(|usage| {
            let stats = text("memory.stat").map(|text| flat_keyed(&text).collect()).unwrap_or_default();
            let data = |usage, peak: &str, limit: &str| grpc::MemoryData {
                usage,
                max_usage: number(peak).unwrap_or(0),
                failcnt: 0,
                limit: number(limit).unwrap_or(0),
            };
            memory_stats(
                stats,
                data(usage, "memory.peak", "memory.max"),
                data(number("memory.swap.current").unwrap_or(0), "memory.swap.peak", "memory.swap.max"),
            )
        });
        grpc::CgroupStats {
            cpu_stats: text("cpu.stat").map(|text| cpu_stats(&text)),
            memory_stats: memory,
            pids_stats: number("pids.current").map(|current| grpc::PidsStats {
                current,
                limit: text("pids.max").map_or(0, |text| number_or(&text, 0)),
            }),
            blkio_stats: text("io.stat").map(|text| io_stats(&text)),
            ..Default::default()
        }
    }
}

fn number_or(text: &str, for_max: u64) -> u64 {
    text.trim().parse().unwrap_or(for_max)
}

fn flat_keyed(text: &str) -> impl Iterator<Item = (String, u64)> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
}

fn cpu_stats(text: &str) -> grpc::CpuStats {
    let value = |wanted: &str| flat_keyed(text).find(|(key, _)| key == wanted).map_or(0, |(_, value)| value);
    let ns = |wanted: &str| value(wanted).saturating_mul(1000);
    grpc::CpuStats {
        cpu_usage: Some(grpc::CpuUsage {
            total_usage: ns("usage_usec"),
            percpu_usage: Vec::new(),
            usage_in_kernelmode: ns("system_usec"),
            usage_in_usermode: ns("user_usec"),
        }),
        throttling_data: Some(grpc::ThrottlingData {
            periods: value("nr_periods"),
            throttled_periods: value("nr_throttled"),
            throttled_time: ns("throttled_usec"),
        }),
    }
}

fn memory_stats(
    stats: std::collections::BTreeMap<String, u64>,
    usage: grpc::MemoryData,
    swap: grpc::MemoryData,
) -> grpc::MemoryStats {
    let of = |key: &str| stats.get(key).copied().unwrap_or(0);
    grpc::MemoryStats {
        cache: of("file"),
        usage: Some(usage),
        swap_usage: Some(swap),
        kernel_usage: Some(grpc::MemoryData { usage: of("kernel"), ..Default::default() }),
        use_hierarchy: true,
        stats,
    }
}

fn io_stats(text: &str) -> grpc::BlkioStats {
    let mut entries = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let op = match key {
                "rbytes" => "read",
                "wbytes" => "write",
                other => other,
            };
            let Ok(value) = value.parse() else { continue };
            entries.push(grpc::BlkioStatsEntry { major, minor, op: op.to_owned(), value });
        }
    }
    grpc::BlkioStats { io_service_bytes_recursive: entries, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_relative_path_when_each_form_then_below_root() {
        let path = |wanted: &str| relative_path(wanted, "c1").expect("a path");
        assert_eq!(path(""), Path::new("c1"));
        assert_eq!(path("/"), Path::new("c1"));
        assert_eq!(path("/kubepods/pod7//c1/"), Path::new("kubepods/pod7/c1"));
        assert_eq!(path("system.slice:kata:c1"), Path::new("system.slice/kata/c1"));
        assert!(relative_path("/a/../../b", "c1").is_err());
    }

    #[test]
    fn test_plan_limits_when_values_are_not_positive_then_left_out() {
        let resources = grpc::LinuxResources {
            memory: Some(grpc::LinuxMemory { limit: -1, swap: -1, ..Default::default() }),
            cpu: Some(grpc::LinuxCpu { quota: -1, ..Default::default() }),
            pids: Some(grpc::LinuxPids { limit: 0 }),
            ..Default::default()
        };
        assert_eq!(plan_limits(&resources), []);
    }

    #[test]
    fn test_plan_limits_when_all_are_set_then_files_of_version_2() {
        let resources = grpc::LinuxResources {
            memory: Some(grpc::LinuxMemory { limit: 100, swap: 150, reservation: 50, ..Default::default() }),
            cpu: Some(grpc::LinuxCpu {
                shares: 1024,
                quota: 50_000,
                cpus: "0-1".into(),
                ..Default::default()
            }),
            pids: Some(grpc::LinuxPids { limit: 7 }),
            hugepage_limits: vec![grpc::LinuxHugepageLimit { pagesize: "2MB".into(), limit: 4 }],
            block_io: Some(grpc::LinuxBlockIo {
                throttle_write_bps_device: vec![grpc::LinuxThrottleDevice { major: 8, minor: 0, rate: 9 }],
                ..Default::default()
            }),
            ..Default::default()
        };
        let plan = plan_limits(&resources);
        let plan: Vec<_> = plan.iter().map(|(file, value)| (file.as_str(), value.as_str())).collect();
        assert_eq!(
            plan,
            [
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("memory.low", "50"),
                ("memory.max", "100"),
                ("memory.swap.max", "50"),
                ("pids.max", "7"),
                ("hugetlb.2MB.max", "4"),
                ("io.max", "8:0 wbps=9"),
            ]
        );
    }

    #[test]
    fn test_plan_limits_when_shares_are_extreme_then_weight_in_range() {
        let weight = |shares| {
            let cpu = grpc::LinuxCpu { shares, ..Default::default() };
            plan_limits(&grpc::LinuxResources { cpu: Some(cpu), ..Default::default() })[0].1.clone()
        };
        assert_eq!(
            (weight(1), weight(2), weight(262_144), weight(u64::MAX)),
            ("1".into(), "1".into(), "10000".into(), "10000".into())
        );
    }

    #[test]
    fn test_stats_when_texts_are_read_then_nanoseconds_and_operations() {
        let cpu = cpu_stats(
            "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 1\nnr_throttled 0\nthrottled_usec 4\n",
        );
        assert_eq!(cpu.cpu_usage.expect("usage").total_usage, 5000);
        assert_eq!(cpu.throttling_data.expect("throttling").throttled_time, 4000);
        let io = io_stats("8:16 rbytes=10 wbytes=20 rios=1\nmalformed\n").io_service_bytes_recursive;
        let io: Vec<_> =
            io.iter().map(|entry| (entry.major, entry.minor, entry.op.as_str(), entry.value)).collect();
        assert_eq!(io, [(8, 16, "read", 10), (8, 16, "write", 20), (8, 16, "rios", 1)]);
    }
}
