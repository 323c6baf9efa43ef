//! Unix sockets in ways that the standard library does not offer: connect without waiting, listen in private.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Connections that may wait to be accepted.
const LISTEN_BACKLOG: libc::c_int = 256;

fn address_of(path: &Path) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let bytes = path.as_os_str().as_bytes();
    if bytes.contains(&0) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // One byte stays zero: the end of the path.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() {
        return Err(io::Error::from_raw_os_error(if bytes.is_empty() {
            libc::ENOENT
        } else {
            libc::ENAMETOOLONG
        }));
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(address)
}

const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_un>() as libc::socklen_t;

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Connect without waiting: a full accept queue is a refusal. The socket is non-blocking.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let address = address_of(path)?;
    let socket = stream_socket()?;
    // SAFETY: the address is initialised, as long as said, and its path ends in a zero byte.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) })?;
    Ok(UnixStream::from(socket))
}

/// A listening socket with its file, which is removed with it.
#[derive(Debug)]
pub struct PrivateListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of our file: another one under the same path is not ours to remove.
    file: Option<(u64, u64)>,
}

impl PrivateListener {
    /// Listen at `path`, which must not exist; only the owner of this process may connect. Non-blocking.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let address = address_of(path)?;
        let socket = stream_socket()?;
        // The file gets the socket's mode, so it is private from its first moment, whatever the umask.
        // SAFETY: no pointers are passed.
        check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })?;
        // SAFETY: the address is initialised, as long as said, and its path ends in a zero byte.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) })?;
        let file = fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()));
        let bound = Self { listener: UnixListener::from(socket), path: path.to_owned(), file };
        // SAFETY: no pointers are passed.
        check(unsafe { libc::listen(bound.listener.as_raw_fd(), LISTEN_BACKLOG) })?;
        Ok(bound)
    }

    /// The socket to accept from.
    pub fn socket(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for PrivateListener {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path).ok().map(|file| (file.dev(), file.ino()));
        if found.is_some()
            && found == self.file
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("{} can't be removed: {error}", self.path.display());
        }
        // SAFETY: no pointers are passed. A forked child may hold a duplicate: closing alone would not refuse diallers.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
    }
}
