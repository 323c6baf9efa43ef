//! The error of this crate.

use std::time::Duration;

use nix::errno::Errno;

/// Every way in which a connection can fail to come about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// A system call failed in a way that trying again does not cure.
    #[error("{op} on {target} failed: {errno}")]
    Io {
        /// The call.
        op: &'static str,
        /// Address or path.
        target: String,
        /// The error number.
        errno: Errno,
    },
    /// Nobody accepted, or nobody came, within the time.
    #[error("no connection with {target} within {} s{}", .timeout.as_secs_f64(), .last.as_ref().map(|why| format!(", last: {why}")).unwrap_or_default())]
    DeadlineExceeded {
        /// Address or path.
        target: String,
        /// The time that was given.
        timeout: Duration,
        /// How the last attempt failed.
        last: Option<String>,
    },
    /// The step was made to fail.
    #[error(transparent)]
    Failpoint(#[from] casemate_failpoint::Failure),
    /// The watched process ended.
    #[error("no connection with {target}: the process that serves it has ended")]
    WatchEnded {
        /// Address or path.
        target: String,
    },
}
