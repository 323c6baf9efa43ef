//! What PID 1 does before it serves: file systems, a root that containers can be made on, modules, loopback.

pub mod modules;
pub mod mounts;
pub mod power;

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::unistd::sethostname;

use crate::error::{Context, Result};
use crate::marks::mark;

/// Bring up the loopback device.
pub fn bring_up_loopback() -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("socket", "for the loopback device")?;
    let mut name = [0; libc::IFNAMSIZ];
    name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    let up = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(libc::c_short::MAX);
    let request = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: up } };
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    nix::errno::Errno::result(result).map(drop).context("bring up", "lo")
}

/// Set the guest's name: the first word of `/etc/hostname`, else `localhost`.
pub fn set_default_hostname() -> Result<()> {
    let text = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = text.split_whitespace().next().unwrap_or("localhost");
    sethostname(name).context("sethostname", name)
}

/// Mount the guest's file systems and, on an initramfs, move to a root that can be pivoted away from.
///
/// Returns the directory of kernel modules, opened before the move.
pub fn prepare_root() -> Result<Option<modules::ModuleDirectory>> {
    let directory = modules::ModuleDirectory::open();
    mounts::mount_all()?;
    mark("mounts");
    Ok(directory)
}
