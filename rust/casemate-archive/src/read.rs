//! Read one file of an unpacked tree; remove the tree.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use crate::ArchiveError;
use crate::tree::{self, Missing, Tree, os};

/// As many links in the last component as the kernel follows.
const MAX_LINKS: usize = 40;

/// Content of the regular file `path` below `directory`, links resolved as inside a chroot; None when there is no such
/// file. Does not block on FIFOs or devices: they count as not there.
///
/// # Errors
/// [`ArchiveError::TooLarge`] beyond `max_bytes`; [`ArchiveError::Refused`] for a loop of links or a parent that is not a
/// directory; [`ArchiveError::Host`].
pub fn read_file(directory: &Path, path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, ArchiveError> {
    let tree = Tree::open(directory)?;
    let entry = path.as_os_str().as_encoded_bytes();
    let mut wanted = entry.to_vec();
    for _ in 0..=MAX_LINKS {
        let components: Vec<&[u8]> =
            wanted.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
        let Some((name, parents)) = components.split_last() else { return Ok(None) };
        let Some(parent) = tree.walk(parents, Missing::Fail, entry, &mut |_| Ok(()))? else {
            return Ok(None);
        };
        let failed = |op, errno| ArchiveError::host(op, &parent.join(name), errno);
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match parent.stat(name) {
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFREG => {
                let file = openat(&parent.fd, os(name), flags, Mode::empty());
                let file = File::from(file.map_err(|errno| failed("open", errno))?);
                let mut content = Vec::new();
                file.take(max_bytes.saturating_add(1))
                    .read_to_end(&mut content)
                    .map_err(|error| ArchiveError::read(&error, &path.display().to_string(), "file", 0))?;
                if content.len() as u64 > max_bytes {
                    return Err(ArchiveError::TooLarge { limit_bytes: max_bytes });
                }
                return Ok(Some(content));
            }
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFLNK => {
                let target = readlinkat(&parent.fd, os(name)).map_err(|errno| failed("readlink", errno))?;
                let target = target.as_encoded_bytes();
                wanted = if target.starts_with(b"/") {
                    target.to_vec()
                } else {
                    [&parent.path[..], b"/", target].concat()
                };
            }
            Ok(_) | Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(failed("stat", errno)),
        }
    }
    Err(ArchiveError::refused(entry, "too many symbolic links on its path"))
}

/// Remove `path` with all below it, at any depth and without following links; not there is fine.
///
/// # Errors
/// [`ArchiveError::Host`], or [`ArchiveError::Refused`] for a path without a last component.
pub fn remove_tree(path: &Path) -> Result<(), ArchiveError> {
    let text = path.as_os_str().as_encoded_bytes();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ArchiveError::refused(text, "a path with a last component is expected"));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let directory = match Tree::open(parent) {
        Ok(tree) => tree.root()?,
        Err(ArchiveError::Host { errno: Errno::ENOENT, .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let removed = tree::remove(&directory, name.as_encoded_bytes());
    removed.map(drop).map_err(|errno| ArchiveError::host("unlink", text, errno))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn read(directory: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, ArchiveError> {
        read_file(directory, Path::new("etc/passwd"), max_bytes)
    }

    #[test]
    fn test_read_file_when_links_lead_to_it_inside_then_content() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir_all(top.path().join("nix/store")).unwrap();
        fs::write(top.path().join("nix/store/p"), "root").unwrap();
        symlink("/nix/store", top.path().join("etc")).unwrap();
        symlink("../../../nix/store/p", top.path().join("nix/store/passwd")).unwrap();
        assert_eq!(read(top.path(), 4).unwrap().as_deref(), Some(&b"root"[..]));
        assert!(matches!(read(top.path(), 3), Err(ArchiveError::TooLarge { limit_bytes: 3 })));
    }

    #[test]
    fn test_read_file_when_link_leads_outside_then_not_there() {
        let top = tempfile::tempdir().unwrap();
        fs::write(top.path().join("secret"), "secret").unwrap();
        let root = top.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        symlink(top.path().join("secret"), root.join("etc/passwd")).unwrap();
        assert_eq!(read(&root, 100).unwrap(), None);
        fs::remove_file(root.join("etc/passwd")).unwrap();
        symlink("../../secret", root.join("etc/passwd")).unwrap();
        assert_eq!(read(&root, 100).unwrap(), None);
    }

    #[test]
    fn test_read_file_when_not_a_file_then_not_there() {
        let top = tempfile::tempdir().unwrap();
        assert_eq!(read(top.path(), 100).unwrap(), None);
        fs::create_dir(top.path().join("etc")).unwrap();
        nix::unistd::mkfifo(&top.path().join("etc/passwd"), Mode::S_IRWXU).unwrap();
        assert_eq!(read(top.path(), 100).unwrap(), None);
        fs::remove_file(top.path().join("etc/passwd")).unwrap();
        symlink("passwd", top.path().join("etc/passwd")).unwrap();
        assert!(matches!(read(top.path(), 100), Err(ArchiveError::Refused { .. })));
    }

    #[test]
    fn test_remove_tree_when_it_has_links_then_their_targets_stay() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir_all(top.path().join("tree/a/b/c")).unwrap();
        fs::create_dir_all(top.path().join("kept")).unwrap();
        fs::write(top.path().join("tree/a/file"), "").unwrap();
        symlink(top.path().join("kept"), top.path().join("tree/a/b/link")).unwrap();
        remove_tree(&top.path().join("tree")).unwrap();
        assert!(!top.path().join("tree").exists() && top.path().join("kept").exists());
        remove_tree(&top.path().join("tree")).unwrap();
        remove_tree(&top.path().join("absent/tree")).unwrap();
    }
}
