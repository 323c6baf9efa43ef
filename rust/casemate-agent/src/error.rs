//! What can go wrong in the agent, and how callers see it.

use std::borrow::Cow;

use casemate_ttrpc::message::{Code, Status};
use nix::errno::Errno;
use thiserror::Error;

/// An operation of the agent failed.
///
/// Texts of failed system calls end in the errno's name and text (`ENOENT: No such file or directory`), which callers
/// match; the step `exec` alone stands for a program that could not be run.
#[derive(Debug, Error)]
pub enum AgentError {
    /// A system call failed.
    #[error("{op} {target}: {errno}")]
    System {
        /// What was tried.
        op: Cow<'static, str>,
        /// On what.
        target: String,
        /// Why not.
        errno: Errno,
    },
    /// The request names a container that does not exist.
    #[error("Invalid container id {id}")]
    UnknownContainer {
        /// Name given.
        id: String,
    },
    /// The request about a container's life names one that does not exist.
    #[error("Invalid container id {id}")]
    NoSuchContainer {
        /// Name given.
        id: String,
    },
    /// The request names a process that does not exist.
    #[error("Invalid exec id {exec_id} of container {container_id}")]
    UnknownProcess {
        /// Container asked.
        container_id: String,
        /// Process asked for.
        exec_id: String,
    },
    /// A field of the request makes no sense.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field, in the protocol's spelling.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Something of that name exists already.
    #[error("{what} {id} exists already")]
    Exists {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// The object is in another state than the request needs.
    #[error("{what}: is {state}")]
    WrongState {
        /// The object.
        what: String,
        /// Its state.
        state: &'static str,
    },
    /// The stream was closed or never existed.
    #[error("cannot get stream {stream} of process {exec_id}")]
    NoStream {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// Process asked.
        exec_id: String,
    },
    /// The process has no terminal.
    #[error("process {exec_id} has no terminal")]
    NoTerminal {
        /// Process asked.
        exec_id: String,
    },
    /// Not something this agent does.
    #[error("{what} is not supported")]
    Unsupported {
        /// The feature.
        what: String,
    },
    /// An event did not come in time.
    #[error("ETIME: timed out after {after_ms} ms waiting for {what}")]
    TimedOut {
        /// The event.
        what: String,
        /// How long it was waited for.
        after_ms: u128,
    },
    /// The child of a new process ended without a word.
    #[error("the child of the new process ended before it was ready ({context})")]
    ChildGone {
        /// When.
        context: &'static str,
    },
    /// Bytes that should be a message of a known type are not.
    #[error("{what} can't be decoded: {source}")]
    Undecodable {
        /// The message.
        what: &'static str,
        /// What the decoder says.
        source: prost::DecodeError,
    },
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, AgentError>;

impl AgentError {
    /// A failed system call.
    pub fn system(op: impl Into<Cow<'static, str>>, target: impl Into<String>, errno: Errno) -> Self {
        Self::System { op: op.into(), target: target.into(), errno }
    }

    /// A failed operation of the standard library.
    pub fn io(op: &'static str, target: impl Into<String>, error: &std::io::Error) -> Self {
        Self::system(op, target, Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    /// A field of the request is wrong.
    pub fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }

    /// Status code of the answer.
    pub fn code(&self) -> Code {
        match self {
            Self::UnknownContainer { .. } | Self::Invalid { .. } | Self::Undecodable { .. } => {
                Code::InvalidArgument
            }
            Self::UnknownProcess { .. } => Code::NotFound,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::WrongState { .. } => Code::FailedPrecondition,
            Self::NoTerminal { .. } => Code::Unavailable,
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::TimedOut { .. } => Code::DeadlineExceeded,
            Self::System { .. }
            | Self::NoStream { .. }
            | Self::ChildGone { .. }
            | Self::NoSuchContainer { .. } => Code::Internal,
        }
    }
}

impl From<AgentError> for Status {
    fn from(error: AgentError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Adds operation and target to a failed system call.
pub trait Context<T> {
    /// Turn the failure into [`AgentError::System`].
    fn context(self, op: &'static str, target: impl AsRef<str>) -> Result<T>;
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, op: &'static str, target: impl AsRef<str>) -> Result<T> {
        self.map_err(|errno| AgentError::system(op, target.as_ref(), errno))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, op: &'static str, target: impl AsRef<str>) -> Result<T> {
        self.map_err(|error| AgentError::io(op, target.as_ref(), &error))
    }
}
