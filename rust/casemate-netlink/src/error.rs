//! The error of this crate.

use nix::errno::Errno;

/// Every way in which a call can fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    /// A system call failed.
    #[error("{op} {target} failed: {errno}")]
    System {
        /// What was tried.
        op: &'static str,
        /// The interface, path or namespace.
        target: String,
        /// The error number.
        errno: Errno,
    },
    /// A name that no interface can have.
    #[error("`{name}` can't be the name of an interface: {problem}")]
    Name {
        /// The name given.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl NetlinkError {
    pub(crate) fn last(op: &'static str, target: &str) -> Self {
        Self::System { op, target: target.to_owned(), errno: Errno::last() }
    }

    pub(crate) fn io(op: &'static str, target: &str, error: &std::io::Error) -> Self {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        Self::System { op, target: target.to_owned(), errno }
    }
}
