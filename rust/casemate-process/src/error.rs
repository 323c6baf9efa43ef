//! The error of this crate.

use std::time::Duration;

use nix::errno::Errno;

/// What was being done when a child could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
#[non_exhaustive]
pub enum Step {
    /// Preparing descriptors in this process.
    Prepare = 1,
    /// Making the process.
    Clone = 2,
    /// Setting the parent-death signal.
    DeathSignal = 3,
    /// Leaving the session of this process.
    Session = 4,
    /// Placing the descriptors.
    Descriptors = 5,
    /// Changing into the working directory.
    Directory = 6,
    /// Executing the program.
    Execute = 7,
}

impl Step {
    pub(crate) fn from_number(number: i32) -> Self {
        [Self::Prepare, Self::Clone, Self::DeathSignal, Self::Session, Self::Descriptors, Self::Directory]
            .into_iter()
            .find(|step| *step as i32 == number)
            .unwrap_or(Self::Execute)
    }

    fn text(self) -> &'static str {
        match self {
            Self::Prepare => "preparing descriptors",
            Self::Clone => "making the process",
            Self::DeathSignal => "setting the parent-death signal",
            Self::Session => "making a session",
            Self::Descriptors => "placing descriptors",
            Self::Directory => "changing the working directory",
            Self::Execute => "executing it",
        }
    }
}

/// Every way in which a call on a child process can fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The child could not be started; there is none.
    #[error("{program} can't be started: {} failed: {errno}", .step.text())]
    Spawn {
        /// The program.
        program: String,
        /// What failed.
        step: Step,
        /// The error number.
        errno: Errno,
    },
    /// The request makes no sense.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// The start was made to fail.
    #[error(transparent)]
    Failpoint(#[from] casemate_failpoint::Failure),
    /// A system call failed.
    #[error("{op} failed: {errno}")]
    Io {
        /// The call.
        op: &'static str,
        /// The error number.
        errno: Errno,
    },
    /// The wait ended before the process did.
    #[error("the process {pid} did not end within {} s", .timeout.as_secs_f64())]
    DeadlineExceeded {
        /// The process.
        pid: i32,
        /// The time that was given.
        timeout: Duration,
    },
    /// The kernel did not come back from starting the program.
    #[error("{program} was not started within {} s", .timeout.as_secs())]
    SpawnTimedOut {
        /// The program.
        program: String,
        /// The time that was given.
        timeout: Duration,
    },
}

impl ProcessError {
    pub(crate) fn io(op: &'static str, errno: Errno) -> Self {
        Self::Io { op, errno }
    }
}
