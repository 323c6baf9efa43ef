//! Owner, mode, extended attributes and times of one member.

use std::ffi::{CStr, CString};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};
use nix::unistd::{Gid, Uid, fchownat};

use crate::ArchiveError;
use crate::tar::{Entry, Kind};
use crate::tree::{self, Directory, os};

/// The kernel's bound of a list of names.
const XATTR_LIST_MAX: usize = 64 << 10;

/// Set all metadata of `name` in `parent`; the order matters: a change of owner clears setuid bits and capabilities.
///
/// `was_there`: a directory of a lower layer, whose extended attributes are replaced.
pub(super) fn apply(
    parent: &Directory,
    name: &[u8],
    entry: &Entry,
    was_there: bool,
) -> Result<(), ArchiveError> {
    let failed = |op, errno| ArchiveError::host(op, &parent.join(name), errno);
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    fchownat(&parent.fd, os(name), Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
        .map_err(|errno| failed("chown", errno))?;
    if entry.kind != Kind::SymbolicLink {
        // Just made by us, or seen to be a directory: there is no link to follow.
        let mode = Mode::from_bits_truncate(entry.mode);
        fchmodat(&parent.fd, os(name), mode, FchmodatFlags::FollowSymlink)
            .map_err(|errno| failed("chmod", errno))?;
    }
    if was_there || !entry.xattrs.is_empty() {
        let path = tree::proc_path(parent, name).map_err(|errno| failed("setxattr", errno))?;
        if was_there {
            clear_xattrs(&path).map_err(|errno| failed("removexattr", errno))?;
        }
        for (attribute, value) in entry.xattrs.iter().filter(|(attribute, _)| is_kept(attribute)) {
            let attribute = CString::new(&attribute[..])
                .map_err(|_| ArchiveError::refused(&entry.path, "a zero byte in an attribute's name"))?;
            set_xattr(&path, &attribute, value).map_err(|errno| failed("setxattr", errno))?;
        }
    }
    tree::set_time(parent, name, entry.mtime)
}

/// Attributes that describe the file, not the host on which the layer was made.
fn is_kept(attribute: &[u8]) -> bool {
    attribute != b"security.selinux"
        && !attribute.starts_with(b"trusted.overlay.")
        && !attribute.starts_with(b"user.overlay.")
}

fn set_xattr(path: &CStr, attribute: &CStr, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: both strings end in a zero byte and live through the call; `value` is valid for its length, and the
    // kernel reads no more than that.
    let result =
        unsafe { libc::lsetxattr(path.as_ptr(), attribute.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(result).map(drop)
}

fn clear_xattrs(path: &CStr) -> Result<(), Errno> {
    let mut list = vec![0_u8; XATTR_LIST_MAX];
    // SAFETY: `path` ends in a zero byte; the kernel writes at most `list.len()` bytes into `list`.
    let length = unsafe { libc::llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    let length = match Errno::result(length) {
        Ok(length) => usize::try_from(length).unwrap_or(0),
        // A filesystem without attributes has none to clear.
        Err(Errno::EOPNOTSUPP) => 0,
        Err(errno) => return Err(errno),
    };
    for attribute in list[..length].split_inclusive(|byte| *byte == 0) {
        let Ok(attribute) = CStr::from_bytes_with_nul(attribute) else { continue };
        if !is_kept(attribute.to_bytes()) {
            continue;
        }
        // SAFETY: both strings end in a zero byte and live through the call.
        let result = unsafe { libc::lremovexattr(path.as_ptr(), attribute.as_ptr()) };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ENODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
