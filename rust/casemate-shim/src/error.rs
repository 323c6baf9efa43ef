//! The error of this crate.

use std::io;

/// Every way in which a keeper's work can fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShimError {
    /// A system call failed.
    #[error("{op} {target} failed: {source}")]
    System {
        /// What was done.
        op: &'static str,
        /// To what.
        target: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A request that can't be served.
    #[error("{text}")]
    Request {
        /// What a caller may branch on: `invalid`, `state`, `not_found`.
        kind: &'static str,
        /// What is wrong.
        text: String,
    },
    /// The VMM can't be started.
    #[error(transparent)]
    Process(#[from] casemate_process::ProcessError),
    /// The vsock back end can't be started.
    #[error("the vsock back end can't be started: {0}")]
    Vsock(casemate_vhost_vsock::VhostVsockError),
}

impl ShimError {
    pub(crate) fn system(op: &'static str, target: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { op, target: target.into(), source: source.into() }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::Request { kind: "invalid", text: text.into() }
    }

    pub(crate) fn state(text: impl Into<String>) -> Self {
        Self::Request { kind: "state", text: text.into() }
    }

    /// What a caller may branch on.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Request { kind, .. } => kind,
            Self::Process(_) => "spawn",
            Self::System { .. } | Self::Vsock(_) => "host",
        }
    }

    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::System { source, .. } => source.raw_os_error(),
            Self::Process(casemate_process::ProcessError::Spawn { errno, .. }) => Some(*errno as i32),
            _ => None,
        }
    }
}
