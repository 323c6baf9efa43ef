//! Tap devices: an interface on the host whose other side is a descriptor. Source: Linux `Documentation/networking/tuntap.rst`.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{NetlinkError, netns};

/// How a tap device shall be.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct TapOptions<'a> {
    /// The network namespace it is made in; None: the caller's.
    pub netns: Option<BorrowedFd<'a>>,
    /// The user that may open it besides those with CAP_NET_ADMIN.
    pub owner: Option<u32>,
}

impl<'a> TapOptions<'a> {
    /// In the namespace `netns`, for the user `owner`.
    #[must_use]
    pub fn new(netns: Option<BorrowedFd<'a>>, owner: Option<u32>) -> Self {
        Self { netns, owner }
    }
}

/// A tap device. It goes with the last descriptor of it.
#[derive(Debug)]
pub struct Tap {
    /// Its other side: frames, each with a virtio header in front.
    pub fd: OwnedFd,
    /// Its name, given by the kernel when a pattern was asked for.
    pub name: String,
}

/// Make a tap device that is up and has no addresses, IPv6 ones included: what a guest sends reaches nobody by itself.
///
/// `%d` in `name` stands for the lowest number that is free in the namespace.
///
/// # Errors
/// A name that can't be; `/dev/net/tun` can't be opened; no CAP_NET_ADMIN in the namespace; the name is taken. Nothing is left then.
pub fn create_tap(name: &str, options: &TapOptions<'_>) -> Result<Tap, NetlinkError> {
    check_name(name)?;
    match options.netns {
        None => create_here(name, options.owner),
        Some(namespace) => netns::inside(namespace, || create_here(name, options.owner)),
    }
}

fn check_name(name: &str) -> Result<(), NetlinkError> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() >= libc::IFNAMSIZ {
        "it has more than 15 bytes"
    } else if name == "."
        || name == ".."
        || name.bytes().any(|byte| byte == b'/' || byte == b':' || byte <= b' ')
    {
        "it has a character that the kernel refuses"
    } else if name.replacen("%d", "", 1).contains('%') {
        "`%` stands only before one `d`"
    } else {
        return Ok(());
    };
    Err(NetlinkError::Name { name: name.to_owned(), problem })
}

fn create_here(pattern: &str, owner: Option<u32>) -> Result<Tap, NetlinkError> {
    const DEVICE: &str = "/dev/net/tun";
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|error| NetlinkError::io("opening", DEVICE, &error))?;
    let mut request = request_for(pattern);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: `request` lives over the call and is the structure that this request reads and writes.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) };
    if made < 0 {
        return Err(NetlinkError::last("making the tap device", pattern));
    }
    let name = name_of(&request);
    if let Some(owner) = owner {
        let argument = libc::c_ulong::from(owner);
        // SAFETY: this request takes a number, no pointer.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOWNER as libc::Ioctl, argument) } < 0 {
            return Err(NetlinkError::last("giving away", &name));
        }
    }
    disable_ipv6(&name)?;
    set_up(&name)?;
    Ok(Tap { fd: OwnedFd::from(file), name })
}

/// A guest must not announce routers to the host.
fn disable_ipv6(name: &str) -> Result<(), NetlinkError> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match File::options().write(true).open(&path) {
        // The host's kernel has no IPv6.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        opened => opened
            .and_then(|mut file| file.write_all(b"1"))
            .map_err(|error| NetlinkError::io("writing", &path, &error)),
    }
}

fn set_up(name: &str) -> Result<(), NetlinkError> {
    // SAFETY: plain system call without pointers.
    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(NetlinkError::last("a socket for", name));
    }
    // SAFETY: the descriptor was made by the call above and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let mut request = request_for(name);
    // SAFETY: `request` lives over the call and is the structure that this request reads and writes.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as libc::Ioctl, &raw mut request) } < 0 {
        return Err(NetlinkError::last("looking at", name));
    }
    // SAFETY: the request before this one filled in the flags.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as above, read only.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw mut request) } < 0 {
        return Err(NetlinkError::last("setting up", name));
    }
    Ok(())
}

/// A request about the interface `name`, which fits: it was checked.
fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: all zeros is a valid value of this structure of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> =
        request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_check_name_when_the_kernel_could_not_take_it_then_says_why() {
        for name in ["", "a/b", "a b", "a:b", ".", "..", "sixteen-bytes-xx", "cm%s", "cm%d%d", "cm%"] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["cm%d", "cm0", "fifteen-bytes-x"] {
            check_name(name).expect(name);
        }
    }

    #[test]
    fn test_request_when_name_is_set_then_comes_back() {
        assert_eq!(name_of(&request_for("cm12")), "cm12");
    }
}
