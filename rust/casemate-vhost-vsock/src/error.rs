//! What can go wrong for whoever starts a backend.

use std::io;

/// A failure of the backend as a whole. What the guest does wrong never becomes one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostVsockError {
    /// A system call failed.
    #[error("vsock backend: {op} {target}")]
    System {
        /// What was tried.
        op: &'static str,
        /// On what: a path or a name.
        target: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A context id that no guest may have.
    #[error("vsock backend: context id {cid} is not one of a guest (3 to 4294967294)")]
    ContextId {
        /// What was given.
        cid: u32,
    },
    /// The ring implementation refused its parameters.
    #[error("vsock backend: a ring can't be made")]
    Ring(#[source] virtio_queue::Error),
    /// The thread did not end in time.
    #[error("vsock backend: its thread did not end within {waited_s} s")]
    StillRunning {
        /// Seconds waited.
        waited_s: u64,
    },
}

impl VhostVsockError {
    pub(crate) fn system(op: &'static str, target: impl Into<String>, source: io::Error) -> Self {
        Self::System { op, target: target.into(), source }
    }
}
