//! The file system that a container sees.
//!
//! The image's files belong to the container: every path in it is resolved by the kernel as if its root were `/`
//! (`openat2`, RESOLVE_IN_ROOT), and mounts go to the descriptor that this gives, so that no symbolic link leads out.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path};

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{chdir, fchdir, pivot_root};

use crate::launch::status::{Step, StepError};
use crate::mount::MountOptions;

type Result<T> = std::result::Result<T, StepError>;

/// What of `/proc` may be covered by a bind mount.
const COVERABLE_PROC: [&str; 9] = [
    "/proc",
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/net/dev",
];

/// A root under construction.
#[derive(Debug)]
pub struct Rootfs {
    root: OwnedFd,
}

/// A path that names an open descriptor to `mount`.
fn magic_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn set_propagation(target: &str, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>).step("mount propagation", target)
}

impl Rootfs {
    /// Cut the mount namespace off from the guest's and make the root a mount of its own.
    pub fn prepare(spec: &grpc::Spec, linux: &grpc::Linux) -> Result<Self> {
        let path = spec.root.as_ref().map(|root| root.path.as_str()).unwrap_or_default();
        let propagation = match linux.rootfs_propagation.as_str() {
            "" | "rslave" | "slave" => MsFlags::MS_SLAVE,
            "rprivate" | "private" => MsFlags::MS_PRIVATE,
            "rshared" | "shared" => MsFlags::MS_SHARED,
            other => return Err(StepError::new("mount propagation", other, Errno::EINVAL)),
        };
        set_propagation("/", propagation | MsFlags::MS_REC)?;
        mount(Some(path), path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
            .step("bind", path)?;
        set_propagation(path, MsFlags::MS_PRIVATE)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { root: open(path, flags, Mode::empty()).step("open", path)? })
    }

    /// Open what a path of the container names.
    pub fn open(&self, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
        self.open_resolving(path, flags, ResolveFlag::empty())
    }

    fn open_resolving(&self, path: &str, flags: OFlag, resolve: ResolveFlag) -> nix::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | resolve;
        openat2(&self.root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
    }

    /// Make a directory of the container and those above it, and return it.
    pub fn make_directory(&self, path: &str) -> Result<OwnedFd> {
        let path = if path.is_empty() { "/" } else { path };
        match self.open(path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOENT) => {}
            result => return result.step("open directory", path),
        }
        let (parent, name) = self.make_parent(path)?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {
                self.open(path, OFlag::O_PATH | OFlag::O_DIRECTORY).step("open directory", path)
            }
            Err(errno) => Err(StepError::new("mkdir", path, errno)),
        }
    }

    /// Make the directory that a path lies in; it and the last name.
    pub fn make_parent<'a>(&self, path: &'a str) -> Result<(OwnedFd, &'a str)> {
        let path_of = Path::new(path);
        let (Some(parent), Some(name)) = (path_of.parent().and_then(Path::to_str), path_of.file_name())
        else {
            return Err(StepError::new("resolve", path, Errno::EINVAL));
        };
        let name = name.to_str().ok_or_else(|| StepError::new("resolve", path, Errno::EINVAL))?;
        Ok((self.make_directory(parent)?, name))
    }

    fn make_file(&self, path: &str) -> Result<OwnedFd> {
        match self.open(path, OFlag::O_PATH) {
            Err(Errno::ENOENT) => {}
            result => return result.step("open", path),
        }
        let (parent, name) = self.make_parent(path)?;
        let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        drop(openat(&parent, name, flags, Mode::from_bits_truncate(0o644)).step("create", path)?);
        self.open(path, OFlag::O_PATH).step("open", path)
    }

    /// Whether `/dev` is the container's own and needs its nodes.
    pub fn has_own_dev(&self, mounts: &[grpc::Mount]) -> bool {
        let is_bound = |mount: &grpc::Mount| {
            mount.r#type == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
        };
        !mounts.iter().any(|mount| mount.destination.trim_end_matches('/') == "/dev" && is_bound(mount))
    }

    /// Do one mount of the specification.
    pub fn mount(&self, entry: &grpc::Mount) -> Result<()> {
        let destination = checked_destination(&entry.destination)?;
        let mut options = MountOptions::parse(&entry.options).map_err(|error| {
            StepError::new("mount options", format!("{destination} ({error})"), Errno::EINVAL)
        })?;
        if entry.r#type == "bind" && !options.is_bind() {
            options.flags |= MsFlags::MS_BIND | MsFlags::MS_REC;
        }
        let fstype = if entry.r#type == "cgroup" { "cgroup2" } else { entry.r#type.as_str() };
        let is_kernel_view = fstype == "proc" || fstype == "sysfs";
        if options.is_bind() && destination.starts_with("/proc/") && !COVERABLE_PROC.contains(&destination) {
            return Err(StepError::new("mount over", destination, Errno::EPERM));
        }
        if destination == "/dev" {
            // Nodes come into it first; it is made read-only at the end.
            options.flags -= MsFlags::MS_RDONLY;
        }
        let target = self.make_target(entry, destination, &options)?;
        if is_kernel_view {
            // A link here would let the image choose where the real one is mounted.
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
            self.open_resolving(destination, flags, ResolveFlag::RESOLVE_NO_SYMLINKS)
                .step("open directory", destination)?;
        }
        self.mount_at(&target, entry, destination, fstype, &options)
    }

    fn make_target(&self, entry: &grpc::Mount, destination: &str, options: &MountOptions) -> Result<OwnedFd> {
        let is_file = options.is_bind() && !Path::new(&entry.source).is_dir();
        if is_file { self.make_file(destination) } else { self.make_directory(destination) }
    }

    fn mount_at(
        &self,
        target: &OwnedFd,
        entry: &grpc::Mount,
        destination: &str,
        fstype: &str,
        options: &MountOptions,
    ) -> Result<()> {
        let none = None::<&str>;
        if options.is_bind() {
            let flags = options.flags & (MsFlags::MS_BIND | MsFlags::MS_REC);
            mount(Some(entry.source.as_str()), magic_path(target).as_str(), none, flags, none)
                .step("bind", format!("{} at {destination}", entry.source))?;
        } else {
            let data = (!options.data.is_empty()).then_some(options.data.as_str());
            let source = if entry.source.is_empty() { fstype } else { entry.source.as_str() };
            mount(Some(source), magic_path(target).as_str(), Some(fstype), options.flags, data)
                .step("mount", format!("{fstype} at {destination}"))?;
        }
        let again = options.bind_remount_flags();
        let needs_remount = options.is_bind() && !again.is_empty();
        if !needs_remount && options.propagation.is_empty() {
            return Ok(());
        }
        // The descriptor names what is below the new mount: open anew what is on top.
        let top = magic_path(&self.open(destination, OFlag::O_PATH).step("open", destination)?);
        if needs_remount {
            let flags = again | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(none, top.as_str(), none, flags, none).step("remount", destination)?;
        }
        options.propagation.iter().try_for_each(|change| set_propagation(&top, *change))
    }

    /// Set kernel parameters, through the guest's `/proc` and in the namespaces of this process.
    pub fn apply_sysctls(&self, linux: &grpc::Linux) -> Result<()> {
        for (key, value) in &linux.sysctl {
            let path = format!("/proc/sys/{}", key.replace('.', "/"));
            match std::fs::write(&path, value) {
                // Not in this kernel.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                result => result.step("sysctl", key)?,
            }
        }
        Ok(())
    }

    /// Make it this process's root and let go of the guest's.
    pub fn pivot(self) -> Result<()> {
        let old = open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .step("open", "/")?;
        fchdir(&self.root).step("chdir", "new root")?;
        pivot_root(".", ".").step("pivot_root", "new root")?;
        fchdir(&old).step("chdir", "old root")?;
        set_propagation(".", MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
        umount2(".", MntFlags::MNT_DETACH).step("unmount", "old root")?;
        chdir("/").step("chdir", "/")
    }

    /// Hide and protect paths, once the root is this process's own.
    pub fn finish(spec: &grpc::Spec, linux: &grpc::Linux) -> Result<()> {
        for path in &linux.masked_paths {
            mask(checked_destination(path)?)?;
        }
        for path in &linux.readonly_paths {
            make_readonly(checked_destination(path)?)?;
        }
        for entry in spec.mounts.iter().filter(|entry| entry.destination == "/dev") {
            if entry.options.iter().any(|option| option == "ro") {
                remount_readonly("/dev")?;
            }
        }
        if spec.root.as_ref().is_some_and(|root| root.readonly) { remount_readonly("/") } else { Ok(()) }
    }
}

/// A destination is absolute and does not climb.
fn checked_destination(path: &str) -> Result<&str> {
    let climbs = Path::new(path).components().any(|part| part == Component::ParentDir);
    if !path.starts_with('/') || climbs {
        return Err(StepError::new("resolve", path, Errno::EINVAL));
    }
    Ok(if path.len() > 1 { path.trim_end_matches('/') } else { path })
}

/// Cover a file with `/dev/null`, a directory with an empty read-only tmpfs.
fn mask(path: &str) -> Result<()> {
    let kind = match File::open(path).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_dir() => Some("tmpfs"),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(()),
        // What can't be opened, for instance a device that is not there, is covered as a file.
        _ => None,
    };
    let result = match kind {
        Some(tmpfs) => {
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some(tmpfs), path, kind, flags, Some("size=0k,nr_inodes=1"))
        }
        None => mount(Some("/dev/null"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>),
    };
    result.step("mask", path)
}

fn make_readonly(path: &str) -> Result<()> {
    match mount(Some(path), path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>) {
        Ok(()) => remount_readonly(path),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        Err(errno) => Err(StepError::new("bind", path, errno)),
    }
}

fn remount_readonly(path: &str) -> Result<()> {
    // Flags that the mount has must be given again; those of access times stay by themselves.
    let kept = nix::sys::statvfs::statvfs(path).step("statvfs", path)?.flags().bits();
    let known = [
        (libc::ST_NOSUID, MsFlags::MS_NOSUID),
        (libc::ST_NODEV, MsFlags::MS_NODEV),
        (libc::ST_NOEXEC, MsFlags::MS_NOEXEC),
    ];
    let kept =
        known.iter().filter(|(bit, _)| kept & bit != 0).fold(MsFlags::empty(), |all, (_, flag)| all | *flag);
    let flags = kept | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>).step("remount", path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn rootfs(path: &Path) -> Rootfs {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Rootfs { root: open(path, flags, Mode::empty()).expect("opens") }
    }

    #[test]
    fn test_checked_destination_when_relative_or_climbing_then_refused() {
        for path in ["", "a", "/a/../b", "/.."] {
            assert!(checked_destination(path).is_err(), "{path}");
        }
        assert_eq!(checked_destination("/a/b/"), Ok("/a/b"));
        assert_eq!(checked_destination("/"), Ok("/"));
    }

    #[test]
    fn test_make_directory_when_a_link_points_out_then_stays_inside() {
        let outside = tempfile::tempdir().expect("a directory");
        let inside = tempfile::tempdir().expect("a directory");
        symlink(outside.path(), inside.path().join("absolute")).expect("linked");
        symlink("../../../../../../tmp", inside.path().join("climbing")).expect("linked");
        let root = rootfs(inside.path());
        // Both lead to directories that exist outside and not inside: refused or made inside, never made outside.
        drop(root.make_directory("/absolute/made"));
        drop(root.make_directory("/climbing/casemate-made"));
        assert!(!outside.path().join("made").exists());
        assert!(!Path::new("/tmp/casemate-made").exists());
        root.make_directory("/a/b/c").expect("made");
        assert!(inside.path().join("a/b/c").is_dir());
    }

    #[test]
    fn test_make_file_when_parent_is_missing_then_made() {
        let inside = tempfile::tempdir().expect("a directory");
        rootfs(inside.path()).make_file("/etc/x/resolv.conf").expect("made");
        assert!(inside.path().join("etc/x/resolv.conf").is_file());
    }

    #[test]
    fn test_mount_when_bind_covers_other_parts_of_proc_then_refused() {
        let inside = tempfile::tempdir().expect("a directory");
        let entry = grpc::Mount {
            destination: "/proc/sys".into(),
            source: "/".into(),
            r#type: "bind".into(),
            ..Default::default()
        };
        let error = rootfs(inside.path()).mount(&entry).expect_err("refused");
        assert_eq!((error.step.as_ref(), error.errno), ("mount over", Errno::EPERM));
    }
}
