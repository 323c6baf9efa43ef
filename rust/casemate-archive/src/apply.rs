//! The rules of a layer: what each member does to the tree.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, makedev, mknodat};
use nix::unistd::{linkat, symlinkat};

use crate::tar::{Entry, Kind, TarReader};
use crate::tree::{self, Directory, Missing, Tree, os};
use crate::{ArchiveError, Limits};

mod metadata;

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const NAME_MAX: usize = 255;
const COPY_BYTES: usize = 128 << 10;

/// Apply every member of `reader` onto `directory`.
pub(crate) fn apply<R: Read>(
    reader: &mut TarReader<R>,
    directory: &Path,
    limits: Limits,
) -> Result<(), ArchiveError> {
    let tree = Tree::open(directory)?;
    let root = tree.root()?;
    let listed = tree::names(&root.fd)
        .map_err(|errno| ArchiveError::host("list", directory.as_os_str().as_encoded_bytes(), errno))?;
    let mut layer = LayerTree {
        tree,
        has_lower: !listed.is_empty(),
        record: Record { limits, made: 0, touched: HashSet::new() },
        last_parent: None,
    };
    let mut bytes: u64 = 0;
    let mut buffer = vec![0; COPY_BYTES];
    while let Some(entry) = reader.next_entry()? {
        layer.record.count()?;
        bytes = bytes.saturating_add(entry.size);
        if bytes > limits.max_bytes {
            return Err(ArchiveError::TooLarge { limit_bytes: limits.max_bytes });
        }
        layer.apply_entry(&entry, reader, &mut buffer)?;
    }
    layer.leave()
}

/// What this layer did so far.
struct Record {
    limits: Limits,
    made: u64,
    /// Directory entries of this layer, as (inode of the directory, name): whiteouts spare them. An inode that is
    /// freed and used again belongs to a directory that this layer made, so a stale pair spares nothing wrongly.
    touched: HashSet<(u64, Vec<u8>)>,
}

impl Record {
    fn count(&mut self) -> Result<(), ArchiveError> {
        self.made += 1;
        if self.made > self.limits.max_entries {
            return Err(ArchiveError::TooManyEntries { limit: self.limits.max_entries });
        }
        Ok(())
    }
}

struct LayerTree {
    tree: Tree,
    /// Whether anything was there before this layer; without it whiteouts mean nothing.
    has_lower: bool,
    record: Record,
    /// Members of one directory follow each other: its path as written, and the directory. The only directory of the
    /// tree whose time is not the one it shall have: [`Self::leave`] gives it back.
    last_parent: Option<(Vec<u8>, Directory)>,
}

impl LayerTree {
    fn apply_entry<R: Read>(
        &mut self,
        entry: &Entry,
        reader: &mut TarReader<R>,
        buffer: &mut [u8],
    ) -> Result<(), ArchiveError> {
        let components = split(&entry.path, &entry.path)?;
        let Some((name, parents)) = components.split_last() else {
            if entry.kind != Kind::Directory {
                return Err(ArchiveError::refused(&entry.path, "it would replace the root directory"));
            }
            self.leave()?;
            return metadata::apply(&self.tree.root()?, b".", entry, true);
        };
        let key = parents.join(&b'/');
        if self.last_parent.as_ref().is_none_or(|(written, _)| *written != key) {
            self.leave()?;
            self.last_parent = Some((key, self.walk(parents, &entry.path)?));
        }
        let Some((key, parent)) = self.last_parent.take() else { return Ok(()) };
        let keep_parent = if name.starts_with(WHITEOUT) {
            self.apply_whiteout(&parent, name, entry)?
        } else {
            self.make(&parent, name, entry, reader, buffer)?
        };
        self.last_parent = Some((key, parent));
        if keep_parent { Ok(()) } else { self.leave() }
    }

    /// Forget the last parent, whose path may lead elsewhere from now on.
    fn leave(&mut self) -> Result<(), ArchiveError> {
        self.last_parent.take().map_or(Ok(()), |(_, parent)| parent.restore_time())
    }

    fn walk(&mut self, components: &[&[u8]], entry: &[u8]) -> Result<Directory, ArchiveError> {
        let (record, has_lower) = (&mut self.record, self.has_lower);
        let walked = self.tree.walk(components, Missing::Create, entry, &mut |step| {
            if has_lower {
                record.touched.insert((step.parent_inode, step.name.to_vec()));
            }
            if step.is_new { record.count() } else { Ok(()) }
        })?;
        walked.ok_or_else(|| ArchiveError::refused(entry, "its directory could not be made"))
    }

    /// Make one member; answers whether `parent` is still what its path leads to.
    fn make<R: Read>(
        &mut self,
        parent: &Directory,
        name: &[u8],
        entry: &Entry,
        reader: &mut TarReader<R>,
        buffer: &mut [u8],
    ) -> Result<bool, ArchiveError> {
        let failed = |op, errno| ArchiveError::host(op, &parent.join(name), errno);
        let mut kept = true;
        let mut was_directory = false;
        // Once more after whatever had the name is gone.
        for is_retry in [false, true] {
            let made = self.make_once(parent, name, entry)?;
            match made {
                Ok(file) => {
                    if let Some(file) = file {
                        copy(&file, entry, reader, buffer, &parent.join(name))?;
                    }
                    break;
                }
                Err((_, Errno::EEXIST)) if !is_retry => {
                    let stat = parent.stat(name).map_err(|errno| failed("stat", errno))?;
                    if entry.kind == Kind::Directory && tree::is_directory(&stat) {
                        was_directory = true;
                        break;
                    }
                    tree::remove(parent, name).map_err(|errno| failed("unlink", errno))?;
                    kept = false;
                }
                Err((op, errno)) => return Err(failed(op, errno)),
            }
        }
        if self.has_lower {
            self.record.touched.insert((parent.inode, name.to_vec()));
        }
        // A hard link shares the owner, mode and times of the member it names.
        if entry.kind != Kind::HardLink {
            metadata::apply(parent, name, entry, was_directory)?;
        }
        Ok(kept)
    }

    /// One try to make the object itself: a file to be filled, or nothing more to do; or the call that failed.
    #[allow(clippy::type_complexity)]
    fn make_once(
        &self,
        parent: &Directory,
        name: &[u8],
        entry: &Entry,
    ) -> Result<Result<Option<File>, (&'static str, Errno)>, ArchiveError> {
        let private = Mode::from_bits_truncate(0o600);
        let node = |kind, device| {
            mknodat(&parent.fd, os(name), kind, private, device).map(|()| None).map_err(|e| ("mknod", e))
        };
        Ok(match entry.kind {
            Kind::Directory => {
                tree::make_directory(parent, name).map(|()| None).map_err(|errno| ("mkdir", errno))
            }
            Kind::File => {
                let flags =
                    OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                openat(&parent.fd, os(name), flags, private)
                    .map(|fd| Some(File::from(fd)))
                    .map_err(|errno| ("open", errno))
            }
            Kind::SymbolicLink if entry.link.is_empty() => {
                return Err(ArchiveError::refused(&entry.path, "a symbolic link without target"));
            }
            Kind::SymbolicLink => symlinkat(os(&entry.link), &parent.fd, os(name))
                .map(|()| None)
                .map_err(|errno| ("symlink", errno)),
            Kind::Fifo => node(SFlag::S_IFIFO, 0),
            Kind::CharacterDevice => node(SFlag::S_IFCHR, device(entry)?),
            Kind::BlockDevice => node(SFlag::S_IFBLK, device(entry)?),
            Kind::HardLink => {
                let refused = |why| Err(ArchiveError::refused(&entry.path, why));
                let components = split(&entry.link, &entry.path)?;
                let Some((target, parents)) = components.split_last() else {
                    return refused("a hard link to the root directory");
                };
                let from = self.tree.walk(parents, Missing::Fail, &entry.path, &mut |_| Ok(()))?;
                let Some(from) = from else { return refused("a hard link whose target does not exist") };
                match from.stat(target) {
                    Err(Errno::ENOENT) => return refused("a hard link whose target does not exist"),
                    Ok(stat) if tree::is_directory(&stat) => return refused("a hard link to a directory"),
                    Ok(_) if from.inode == parent.inode && *target == name => {
                        return refused("a hard link to itself");
                    }
                    _ => {}
                }
                linkat(&from.fd, os(target), &parent.fd, os(name), AtFlags::empty())
                    .map(|()| None)
                    .map_err(|errno| ("link", errno))
            }
        })
    }

    /// Hide what lower layers have; answers whether `parent` is still what its path leads to.
    fn apply_whiteout(
        &mut self,
        parent: &Directory,
        name: &[u8],
        entry: &Entry,
    ) -> Result<bool, ArchiveError> {
        if name == OPAQUE {
            if self.has_lower {
                let emptied =
                    parent.child(b".").map_err(|errno| ArchiveError::host("open", &parent.path, errno))?;
                self.remove_lower(Directory { path: parent.path.clone(), ..emptied })?;
            }
            return Ok(false);
        }
        if name.starts_with(WHITEOUT_META) {
            // Book-keeping of the driver that the whiteout names come from.
            return Ok(true);
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(ArchiveError::refused(&entry.path, "a whiteout of no name"));
        }
        if !self.has_lower {
            return Ok(true);
        }
        let path = parent.join(hidden);
        if self.record.touched.contains(&(parent.inode, hidden.to_vec())) {
            let stat = parent.stat(hidden).map_err(|errno| ArchiveError::host("stat", &path, errno))?;
            if tree::is_directory(&stat) {
                let emptied = parent.child(hidden);
                self.remove_lower(emptied.map_err(|errno| ArchiveError::host("open", &path, errno))?)?;
            }
        } else {
            tree::remove(parent, hidden).map_err(|errno| ArchiveError::host("unlink", &path, errno))?;
        }
        Ok(false)
    }

    /// Remove what lower layers put below `top`; what this layer made or went through stays.
    ///
    /// Works with two descriptors at any depth.
    fn remove_lower(&self, top: Directory) -> Result<(), ArchiveError> {
        // Of each level: the subdirectories still to be looked into.
        let mut levels = vec![self.remove_untouched(&top)?];
        let mut current = top;
        while let Some(subdirectories) = levels.last_mut() {
            let next = subdirectories.pop();
            let failed = |errno| ArchiveError::host("open", &current.path, errno);
            if let Some(name) = next {
                current = current.child(name.to_bytes()).map_err(failed)?;
                levels.push(self.remove_untouched(&current)?);
            } else {
                levels.pop();
                if !levels.is_empty() {
                    current = current.parent().map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    /// Remove the entries that this layer has no part in; answers the directories among the others.
    fn remove_untouched(&self, directory: &Directory) -> Result<Vec<CString>, ArchiveError> {
        let failed = |op, errno| ArchiveError::host(op, &directory.path, errno);
        let mut subdirectories = Vec::new();
        for name in tree::names(&directory.fd).map_err(|errno| failed("list", errno))? {
            let bytes = name.to_bytes();
            if !self.record.touched.contains(&(directory.inode, bytes.to_vec())) {
                tree::remove(directory, bytes).map_err(|errno| failed("unlink", errno))?;
            } else if tree::is_directory(&directory.stat(bytes).map_err(|errno| failed("stat", errno))?) {
                subdirectories.push(name);
            }
        }
        directory.restore_time()?;
        Ok(subdirectories)
    }
}

/// Components of a member's name; `.` and empty ones dropped, `..` refused.
fn split<'a>(path: &'a [u8], entry: &[u8]) -> Result<Vec<&'a [u8]>, ArchiveError> {
    let mut components = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(ArchiveError::refused(entry, "its path has a `..`")),
            _ if name.len() > NAME_MAX => return Err(ArchiveError::refused(entry, "its name is too long")),
            _ => components.push(name),
        }
    }
    Ok(components)
}

fn device(entry: &Entry) -> Result<libc::dev_t, ArchiveError> {
    let (major, minor) = entry.device;
    // What the kernel can hold: 12 and 20 bits.
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(ArchiveError::refused(&entry.path, "a device number out of range"));
    }
    Ok(makedev(major, minor))
}

fn copy<R: Read>(
    file: &File,
    entry: &Entry,
    reader: &mut TarReader<R>,
    buffer: &mut [u8],
    path: &[u8],
) -> Result<(), ArchiveError> {
    let failed = |op, error: std::io::Error| {
        ArchiveError::host(op, path, Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    };
    let mut end = 0;
    for extent in &entry.extents {
        let mut at = extent.offset;
        end = extent.offset + extent.length;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let n = reader.read_data(&mut buffer[..wanted])?;
            if n == 0 {
                return Err(ArchiveError::refused(&entry.path, "less data than its map of holes says"));
            }
            casemate_failpoint::hit("native.unpack_write")?;
            file.write_all_at(&buffer[..n], at).map_err(|error| failed("write", error))?;
            at += n as u64;
        }
    }
    if entry.size > end || entry.extents.last().is_some_and(|extent| extent.length == 0) {
        file.set_len(entry.size).map_err(|error| failed("truncate", error))?;
    }
    Ok(())
}
