//! AF_VSOCK.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, getsockopt, socket, sockopt};

use crate::error::VsockError;
use crate::patience::{Attempt, Patience, Ready};

/// A context identifier: the address of a guest or of the host (2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cid(pub u32);

/// A vsock port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Port(pub u32);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn address(cid: Cid, port: Port) -> VsockAddr {
    VsockAddr::new(cid.0, port.0)
}

/// Connects to a guest through the kernel, trying again while it refuses: nobody listens there yet. Blocks.
///
/// # Errors
/// [`VsockError`].
pub fn connect_vsock(cid: Cid, port: Port, patience: Patience<'_>) -> Result<OwnedFd, VsockError> {
    let mut attempt = Attempt::new(patience, format!("vsock://{}:{port}", cid.0));
    let address = address(cid, port);
    loop {
        match connect_once(&attempt, &address)? {
            Ok(socket) => return Ok(socket),
            Err(errno) if is_worth_another_try(errno) => attempt.pause(errno.desc())?,
            Err(errno) => return Err(attempt.io("connect", errno)),
        }
    }
}

/// A guest that is not up yet refuses (`ECONNRESET`), is not known (`ENODEV`), or does not answer (`ETIMEDOUT`).
pub(crate) fn is_worth_another_try(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ECONNRESET
            | Errno::ECONNREFUSED
            | Errno::ENODEV
            | Errno::ETIMEDOUT
            | Errno::EHOSTUNREACH
            | Errno::EINTR
    )
}

fn connect_once(attempt: &Attempt<'_>, address: &VsockAddr) -> Result<Result<OwnedFd, Errno>, VsockError> {
    casemate_failpoint::hit("native.connect")?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)
        .map_err(|errno| attempt.io("socket", errno))?;
    match connect(socket.as_raw_fd(), address) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => {
            // The kernel's own limit is 2 s, after which the socket is ready with ETIMEDOUT.
            while attempt.wait(Some((socket.as_fd(), PollFlags::POLLOUT)), None)? != Ready::Yes {}
            let error =
                getsockopt(&socket, sockopt::SocketError).map_err(|errno| attempt.io("getsockopt", errno))?;
            if error != 0 {
                return Ok(Err(Errno::from_raw(error)));
            }
        }
        Err(errno) => return Ok(Err(errno)),
    }
    make_blocking(attempt, &socket)?;
    Ok(Ok(socket))
}

pub(crate) fn make_blocking(attempt: &Attempt<'_>, socket: &OwnedFd) -> Result<(), VsockError> {
    fcntl(socket, FcntlArg::F_SETFL(OFlag::empty())).map(|_| ()).map_err(|errno| attempt.io("fcntl", errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_when_built_then_has_cid_and_port_whole() {
        for (cid, port) in [(3, 1024), (u32::MAX, u32::MAX), (2, 10_240)] {
            let built = address(Cid(cid), Port(port));
            assert_eq!((built.cid(), built.port()), (cid, port));
        }
    }

    #[test]
    fn is_worth_another_try_when_the_guest_is_not_up_then_yes_else_no() {
        assert!([Errno::ECONNRESET, Errno::ENODEV, Errno::ETIMEDOUT].into_iter().all(is_worth_another_try));
        assert!(![Errno::EACCES, Errno::EAFNOSUPPORT, Errno::EMFILE].into_iter().any(is_worth_another_try));
    }
}
