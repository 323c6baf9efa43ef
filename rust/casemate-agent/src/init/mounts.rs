//! The guest's own file systems.
//!
//! On an initramfs the root is `rootfs`, which `pivot_root` refuses to leave: a tmpfs takes its place, the file systems are
//! mounted in it, and it is moved onto `/`. What the initramfs holds stays reachable through bind mounts of its
//! top-level directories.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::statfs;
use nix::unistd::{chdir, chroot};

use crate::error::{AgentError, Context, Result};

/// Where the root is built.
const NEW_ROOT: &str = "/.root";

struct Entry {
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
    is_required: bool,
}

const NO_SUID: MsFlags = MsFlags::MS_NOSUID;
const NO_SUID_EXEC_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC).union(MsFlags::MS_NODEV);

const TABLE: [Entry; 7] = [
    entry("proc", "/proc", NO_SUID_EXEC_DEV, "", true),
    entry("sysfs", "/sys", NO_SUID_EXEC_DEV, "", true),
    entry("devtmpfs", "/dev", NO_SUID, "", false),
    entry("tmpfs", "/dev/shm", NO_SUID.union(MsFlags::MS_NODEV), "", true),
    entry("devpts", "/dev/pts", NO_SUID.union(MsFlags::MS_NOEXEC), "ptmxmode=0666", true),
    entry("tmpfs", "/run", NO_SUID.union(MsFlags::MS_NODEV), "mode=755", true),
    entry("cgroup2", "/sys/fs/cgroup", NO_SUID_EXEC_DEV.union(MsFlags::MS_RELATIME), "nsdelegate", true),
];

const fn entry(
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
    is_required: bool,
) -> Entry {
    Entry { fstype, target, flags, data, is_required }
}

/// Mount everything of the table, below a fresh root when `/` is the initramfs.
pub fn mount_all() -> Result<()> {
    let is_initramfs = is_initramfs()?;
    let root = if is_initramfs { NEW_ROOT } else { "" };
    if is_initramfs {
        make_directory(NEW_ROOT)?;
        mount(Some("tmpfs"), NEW_ROOT, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .context("mount", NEW_ROOT)?;
    }
    for entry in &TABLE {
        mount_entry(root, entry)?;
    }
    replace_ptmx(root)?;
    if is_initramfs {
        keep_initramfs_directories()?;
        move_onto_root()?;
    }
    Ok(())
}

fn mount_entry(root: &str, entry: &Entry) -> Result<()> {
    let target = format!("{root}{}", entry.target);
    make_directory(&target)?;
    let data = (!entry.data.is_empty()).then_some(entry.data);
    match mount(Some(entry.fstype), target.as_str(), Some(entry.fstype), entry.flags, data) {
        // Busy: the kernel or an earlier stage mounted the same there.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) if entry.is_required => Err(AgentError::system("mount", entry.target, errno)),
        Err(errno) => {
            log::warn!("{} not mounted: {errno}", entry.target);
            Ok(())
        }
    }
}

fn make_directory(path: &str) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path).context("mkdir", path)
}

#[allow(clippy::unnecessary_cast, reason = "the types differ between C libraries")]
fn is_initramfs() -> Result<bool> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    let kind = statfs("/").context("statfs", "/")?.filesystem_type().0;
    Ok(kind as i64 == RAMFS_MAGIC || kind as i64 == libc::TMPFS_MAGIC as i64)
}

fn replace_ptmx(root: &str) -> Result<()> {
    let ptmx = format!("{root}/dev/ptmx");
    match fs::remove_file(&ptmx) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(AgentError::io("unlink", ptmx, &error));
        }
        _ => {}
    }
    symlink("pts/ptmx", &ptmx).context("symlink", &ptmx)
}

/// Bind the initramfs's own top-level directories into the new root, and copy its top-level symbolic links.
fn keep_initramfs_directories() -> Result<()> {
    for found in fs::read_dir("/").context("readdir", "/")? {
        let found = found.context("readdir", "/")?;
        let name = found.file_name();
        let (from, to) = (found.path(), Path::new(NEW_ROOT).join(&name));
        if from == Path::new(NEW_ROOT) || to.symlink_metadata().is_ok() {
            continue;
        }
        let kind = found.file_type().context("stat", from.to_string_lossy())?;
        if kind.is_dir() && name != "root" {
            make_directory(&to.to_string_lossy())?;
            mount(Some(&from), &to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .context("bind", to.to_string_lossy())?;
        } else if kind.is_symlink() {
            let target = fs::read_link(&from).context("readlink", from.to_string_lossy())?;
            symlink(target, &to).context("symlink", to.to_string_lossy())?;
        }
    }
    for directory in ["etc", "tmp", "root"] {
        make_directory(&format!("{NEW_ROOT}/{directory}"))?;
    }
    Ok(())
}

fn move_onto_root() -> Result<()> {
    chdir(NEW_ROOT).context("chdir", NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move", NEW_ROOT)?;
    chroot(".").context("chroot", NEW_ROOT)?;
    chdir("/").context("chdir", "/")
}
