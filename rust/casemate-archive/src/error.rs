//! What can go wrong with an archive.

use std::io;

use nix::errno::Errno;

/// A layer or a compressed block that can't be used, or a host that can't hold it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The input ends too early.
    #[error("the archive is cut short after {offset} bytes, in {what}")]
    Truncated {
        /// Uncompressed bytes before the end.
        offset: u64,
        /// What was being read.
        what: &'static str,
    },
    /// Not what the format allows.
    #[error("the archive is damaged at byte {offset}: {what}")]
    Malformed {
        /// Uncompressed bytes before the place.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A compressed stream that does not decode.
    #[error("the {format} stream is damaged: {detail}")]
    Decode {
        /// Name of the compression.
        format: &'static str,
        /// The decoder's words.
        detail: String,
    },
    /// The bytes are not those that the digest names.
    #[error("the {what} is {actual}, {expected} is expected")]
    Digest {
        /// `digest` or `diff_id`.
        what: &'static str,
        /// What was promised.
        expected: String,
        /// What was found.
        actual: String,
    },
    /// A member that is refused.
    #[error("member {entry:?} is refused: {why}")]
    Refused {
        /// Its name, not UTF-8 replaced.
        entry: String,
        /// Reason.
        why: &'static str,
    },
    /// More bytes than allowed.
    #[error("more than {limit_bytes} bytes when uncompressed")]
    TooLarge {
        /// The bound.
        limit_bytes: u64,
    },
    /// More members than allowed.
    #[error("more than {limit} members")]
    TooManyEntries {
        /// The bound.
        limit: u64,
    },
    /// A form that is not read here.
    #[error("{what} {value:?} is not supported")]
    Unsupported {
        /// `media type`, `digest`, `compression`.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// A system call failed.
    #[error("{op} {target}: {errno}")]
    Host {
        /// System call.
        op: &'static str,
        /// What it was about.
        target: String,
        /// Why.
        errno: Errno,
    },
    /// The step was made to fail.
    #[error(transparent)]
    Failpoint(#[from] casemate_failpoint::Failure),
    /// The caller's progress function asked to stop.
    #[error("stopped by the caller")]
    Stopped,
}

impl ArchiveError {
    pub(crate) fn refused(entry: &[u8], why: &'static str) -> Self {
        Self::Refused { entry: String::from_utf8_lossy(entry).into_owned(), why }
    }

    pub(crate) fn host(op: &'static str, target: &[u8], errno: Errno) -> Self {
        Self::Host { op, target: String::from_utf8_lossy(target).into_owned(), errno }
    }

    /// A failed read: the host's fault when it has an errno, else the content's.
    pub(crate) fn read(error: &io::Error, target: &str, format: &'static str, offset: u64) -> Self {
        match error.raw_os_error() {
            Some(errno) => {
                Self::Host { op: "read", target: target.to_owned(), errno: Errno::from_raw(errno) }
            }
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                Self::Truncated { offset, what: "a compressed stream" }
            }
            None => Self::Decode { format, detail: error.to_string() },
        }
    }
}
