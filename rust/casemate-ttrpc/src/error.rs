//! The error of this crate.

use std::time::Duration;

use nix::errno::Errno;

use crate::frame::{FrameError, StreamId};
use crate::message::Status;

/// Every way in which a call on a connection can fail.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TtrpcError {
    /// A system call on the connection failed; the connection is broken.
    #[error("{op} on the connection failed: {errno}")]
    Io {
        /// The system call.
        op: &'static str,
        /// Its error number.
        errno: Errno,
    },
    /// The connection was closed or broken before the answer came.
    #[error("connection closed: {reason}")]
    Closed {
        /// Why, in words.
        reason: String,
    },
    /// The peer did not read for so long that the connection was given up.
    #[error("the peer took no data for {} s", .stalled.as_secs())]
    Stalled {
        /// How long nothing was taken.
        stalled: Duration,
    },
    /// A message larger than a frame may be.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The answer can't be decoded.
    #[error("the answer on stream {stream} can't be decoded")]
    Malformed {
        /// The stream it came on.
        stream: StreamId,
    },
    /// The deadline of the call passed.
    #[error("no answer within {} s", .timeout.as_secs_f64())]
    DeadlineExceeded {
        /// The time that the call was given.
        timeout: Duration,
        /// The time since it was sent.
        waited: Duration,
    },
    /// The peer answered with an error status.
    #[error("{0}")]
    Rpc(Status),
    /// A step was made to fail; a send or a read breaks the connection so.
    #[error(transparent)]
    Failpoint(#[from] casemate_failpoint::Failure),
    /// The slot is not open: never given out, already taken, or cancelled.
    #[error("slot {slot} is not open")]
    UnknownSlot {
        /// The slot asked for.
        slot: StreamId,
    },
    /// The limit of what may be open or unsent on one connection is reached.
    #[error("{open} calls are open and {kept_bytes} bytes unsent on the connection, the limit is reached")]
    Exhausted {
        /// Calls that are open.
        open: usize,
        /// Bytes that the peer has not taken yet.
        kept_bytes: usize,
    },
}

impl TtrpcError {
    pub(crate) fn io(op: &'static str, errno: Errno) -> Self {
        Self::Io { op, errno }
    }
}
