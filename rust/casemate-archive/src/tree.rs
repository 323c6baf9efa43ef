//! A directory as the root of everything: paths are walked one component at a time on descriptors.
//!
//! Symbolic links are resolved as inside a chroot: an absolute target starts at the root, `..` stops there. No call is
//! made on a path of more than one component, so nothing outside the root can be reached. The caller owns
//! the directory alone: nobody renames in it meanwhile.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::dir::Dir as Listing;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, fstatat, mkdirat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::ArchiveError;
use crate::tar::Timestamp;

/// As many as the kernel follows.
const MAX_LINKS: usize = 40;
/// Length of a path below the root: what remains of PATH_MAX for tools that put the root's path before it.
const MAX_PATH_BYTES: usize = 3584;

const OPEN_PATH: OFlag =
    OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// An open directory below the root.
#[derive(Debug)]
pub(crate) struct Directory {
    pub fd: OwnedFd,
    pub inode: u64,
    /// From the root, without links or a leading slash; empty for the root.
    pub path: Vec<u8>,
    /// Its time when it was opened, to be given back after a change of its entries.
    pub mtime: Timestamp,
}

impl Directory {
    fn new(fd: OwnedFd, path: Vec<u8>) -> Result<Self, Errno> {
        let stat = fstat(&fd)?;
        let mtime =
            Timestamp { seconds: stat.st_mtime, nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0) };
        Ok(Self { fd, inode: stat.st_ino, path, mtime })
    }

    /// The directory `name` in it; no link is followed.
    pub(crate) fn child(&self, name: &[u8]) -> Result<Self, Errno> {
        Self::new(openat(&self.fd, os(name), OPEN_PATH, Mode::empty())?, self.join(name))
    }

    /// The directory that it is in; not for the root.
    pub(crate) fn parent(&self) -> Result<Self, Errno> {
        let end = self.path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        Self::new(openat(&self.fd, "..", OPEN_PATH, Mode::empty())?, self.path[..end].to_vec())
    }

    /// Set its times to [`Self::mtime`].
    pub(crate) fn restore_time(&self) -> Result<(), ArchiveError> {
        set_time(self, b".", self.mtime)
    }

    pub(crate) fn stat(&self, name: &[u8]) -> Result<FileStat, Errno> {
        fstatat(&self.fd, os(name), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Path of `name` in it, for messages and for later.
    pub(crate) fn join(&self, name: &[u8]) -> Vec<u8> {
        if self.path.is_empty() { name.to_vec() } else { [&self.path[..], b"/", name].concat() }
    }
}

/// What to do about a directory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Create,
    Fail,
}

/// One directory entry that a walk went through.
pub(crate) struct Step<'a> {
    pub parent_inode: u64,
    pub name: &'a [u8],
    pub is_new: bool,
}

/// Called for every directory that a walk goes through, the root apart.
pub(crate) type OnStep<'a> = &'a mut dyn FnMut(&Step<'_>) -> Result<(), ArchiveError>;

/// The root.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
}

impl Tree {
    pub(crate) fn open(path: &Path) -> Result<Self, ArchiveError> {
        let failed = |errno| ArchiveError::host("open", path.as_os_str().as_bytes(), errno);
        Ok(Self { root: nix::fcntl::open(path, OPEN_PATH, Mode::empty()).map_err(failed)? })
    }

    pub(crate) fn root(&self) -> Result<Directory, ArchiveError> {
        let fd = openat(&self.root, ".", OPEN_PATH, Mode::empty());
        let opened = fd.and_then(|fd| Directory::new(fd, Vec::new()));
        opened.map_err(|errno| ArchiveError::host("open", b"/", errno))
    }

    /// Walk to a directory. `entry` is the member it is for; `on_step` sees each directory passed. New ones get time 0,
    /// those that they are made in keep theirs.
    ///
    /// `Ok(None)`: something is missing and `missing` says not to make it.
    pub(crate) fn walk(
        &self,
        components: &[&[u8]],
        missing: Missing,
        entry: &[u8],
        on_step: OnStep<'_>,
    ) -> Result<Option<Directory>, ArchiveError> {
        let mut pending: Vec<Vec<u8>> = components.iter().rev().map(|name| name.to_vec()).collect();
        let mut current = self.root()?;
        let mut links = 0;
        while let Some(name) = pending.pop() {
            let failed = |op, current: &Directory, errno| ArchiveError::host(op, &current.join(&name), errno);
            if name == b".." {
                if !current.path.is_empty() {
                    current = current.parent().map_err(|errno| failed("open", &current, errno))?;
                }
                continue;
            }
            let mut is_new = false;
            let mut opened = current.child(&name);
            if matches!(opened, Err(Errno::ENOENT)) {
                if missing == Missing::Fail {
                    return Ok(None);
                }
                if current.join(&name).len() > MAX_PATH_BYTES {
                    return Err(ArchiveError::refused(entry, "its path is too long"));
                }
                make_directory(&current, &name).map_err(|errno| failed("mkdir", &current, errno))?;
                set_time(&current, &name, Timestamp::default())?;
                current.restore_time()?;
                is_new = true;
                opened = current.child(&name);
            }
            match opened {
                Ok(next) => {
                    on_step(&Step { parent_inode: current.inode, name: &name, is_new })?;
                    current = next;
                }
                Err(Errno::ENOTDIR | Errno::ELOOP) => {
                    let target = match readlinkat(&current.fd, os(&name)) {
                        Ok(target) => target.into_vec(),
                        Err(Errno::EINVAL) => {
                            return Err(ArchiveError::refused(entry, "its parent is not a directory"));
                        }
                        Err(errno) => return Err(failed("readlink", &current, errno)),
                    };
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(ArchiveError::refused(entry, "too many symbolic links on its path"));
                    }
                    if target.starts_with(b"/") {
                        current = self.root()?;
                    }
                    let parts = target.split(|byte| *byte == b'/').rev();
                    pending.extend(parts.filter(|part| !matches!(*part, b"" | b".")).map(<[u8]>::to_vec));
                }
                Err(errno) => return Err(failed("open", &current, errno)),
            }
        }
        Ok(Some(current))
    }
}

/// The names of a directory, read at once.
pub(crate) fn names(directory: &impl AsFd) -> Result<Vec<CString>, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut listing = Listing::openat(directory, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for item in listing.iter() {
        let item = item?;
        if !matches!(item.file_name().to_bytes(), b"." | b"..") {
            names.push(item.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Remove whatever `name` is, with all below it; answers whether a directory went. Not there is fine.
///
/// Works with two descriptors at any depth.
pub(crate) fn remove(directory: &Directory, name: &[u8]) -> Result<bool, Errno> {
    let file = |fd: &OwnedFd, name: &[u8]| unlinkat(fd, os(name), UnlinkatFlags::NoRemoveDir);
    let folder = |fd: &OwnedFd, name: &[u8]| unlinkat(fd, os(name), UnlinkatFlags::RemoveDir);
    match file(&directory.fd, name) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(false),
        Err(Errno::EISDIR) => {}
        Err(errno) => return Err(errno),
    }
    let mut current = openat(&directory.fd, os(name), OPEN_PATH, Mode::empty())?;
    // Of each level: its name in its parent, and the subdirectories still to be emptied.
    let mut levels: Vec<(Vec<u8>, Vec<CString>)> = vec![(name.to_vec(), unlink_files(&current)?)];
    while let Some((_, subdirectories)) = levels.last_mut() {
        if let Some(next) = subdirectories.pop() {
            current = openat(&current, next.as_c_str(), OPEN_PATH, Mode::empty())?;
            levels.push((next.into_bytes(), unlink_files(&current)?));
            continue;
        }
        let Some((emptied, _)) = levels.pop() else { break };
        if levels.is_empty() {
            folder(&directory.fd, &emptied)?;
        } else {
            current = openat(&current, "..", OPEN_PATH, Mode::empty())?;
            folder(&current, &emptied)?;
        }
    }
    Ok(true)
}

/// Unlink all but directories; answers the directories.
fn unlink_files(directory: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let mut subdirectories = Vec::new();
    for name in names(directory)? {
        match unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) => {}
            Err(Errno::EISDIR) => subdirectories.push(name),
            Err(errno) => return Err(errno),
        }
    }
    Ok(subdirectories)
}

/// A directory with mode 0755, whatever the umask.
pub(crate) fn make_directory(parent: &Directory, name: &[u8]) -> Result<(), Errno> {
    let mode = Mode::from_bits_truncate(0o755);
    mkdirat(&parent.fd, os(name), mode)?;
    fchmodat(&parent.fd, os(name), mode, FchmodatFlags::FollowSymlink)
}

pub(crate) fn is_directory(stat: &FileStat) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR
}

/// Set both times of `name`, not following a link.
pub(crate) fn set_time(parent: &Directory, name: &[u8], time: Timestamp) -> Result<(), ArchiveError> {
    let time = TimeSpec::new(time.seconds, i64::from(time.nanoseconds));
    utimensat(&parent.fd, os(name), &time, &time, UtimensatFlags::NoFollowSymlink)
        .map_err(|errno| ArchiveError::host("utimensat", &parent.join(name), errno))
}

pub(crate) fn os(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

/// Path of `name` in `directory` that no link of the tree can bend: for calls that take no descriptor.
pub(crate) fn proc_path(directory: &Directory, name: &[u8]) -> Result<CString, Errno> {
    let mut path = format!("/proc/self/fd/{}/", directory.fd.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    CString::new(path).map_err(|_| Errno::EINVAL)
}
