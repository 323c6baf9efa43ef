//! Device nodes of a container.

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, makedev, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

use crate::launch::rootfs::Rootfs;
use crate::launch::status::{Step, StepError};

type Result<T> = std::result::Result<T, StepError>;

const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

/// Name and minor number of the memory devices and the terminal (major 1 and 5).
const NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Make the nodes and links that every container has, and those of the specification.
pub fn create(root: &Rootfs, wanted: &[grpc::LinuxDevice]) -> Result<()> {
    let dev = root.make_directory("/dev")?;
    for (name, target) in LINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) => {}
            Err(Errno::EEXIST) if name != "ptmx" => {}
            Err(Errno::EEXIST) => {
                // The image's own node would be the guest's terminal multiplexer.
                unlinkat(&dev, name, UnlinkatFlags::NoRemoveDir).step("unlink", "/dev/ptmx")?;
                symlinkat(target, &dev, name).step("symlink", "/dev/ptmx")?;
            }
            Err(errno) => return Err(StepError::new("symlink", format!("/dev/{name}"), errno)),
        }
    }
    let defaults = NODES.map(|(name, major, minor)| grpc::LinuxDevice {
        path: format!("/dev/{name}"),
        r#type: "c".to_owned(),
        major: major.cast_signed(),
        minor: minor.cast_signed(),
        file_mode: 0o666,
        ..Default::default()
    });
    for device in &defaults {
        if !wanted.iter().any(|other| other.path == device.path) {
            create_node(root, device)?;
        }
    }
    wanted.iter().try_for_each(|device| create_node(root, device))
}

fn create_node(root: &Rootfs, device: &grpc::LinuxDevice) -> Result<()> {
    let path = device.path.as_str();
    let invalid = || StepError::new("mknod", path, Errno::EINVAL);
    if !path.starts_with("/dev/") || path.split('/').any(|part| part == "..") {
        return Err(invalid());
    }
    let kind = match device.r#type.as_str() {
        "c" | "u" => SFlag::S_IFCHR,
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        _ => return Err(invalid()),
    };
    let mode = Mode::from_bits_truncate(if device.file_mode == 0 { 0o666 } else { device.file_mode });
    let number = |number: i64| u64::try_from(number).map_err(|_| invalid());
    let number = makedev(number(device.major)?, number(device.minor)?);
    let (parent, name) = root.make_parent(path)?;
    match mknodat(&parent, name, kind, mode, number) {
        Ok(()) => {}
        // Whatever the image has there is not trusted to be the device.
        Err(Errno::EEXIST) => {
            unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir).step("unlink", path)?;
            mknodat(&parent, name, kind, mode, number).step("mknod", path)?;
        }
        Err(errno) => return Err(StepError::new("mknod", path, errno)),
    }
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    fchownat(&parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).step("chown", path)
}
