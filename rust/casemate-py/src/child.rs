//! `ChildProcess` and `spawn`.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_process::{Child, ProcessError, SpawnRequest};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::Error;
use crate::wait::{Owner, borrow_fd, in_slices, optional_duration, take_fd};

/// A process started by `spawn`. It is killed when this process ends, however it ends.
#[pyclass(frozen, module = "casemate._core")]
pub struct ChildProcess {
    owner: Owner,
    child: Arc<Child>,
}

impl ChildProcess {
    fn checked(&self) -> Result<&Arc<Child>, Error> {
        self.owner.check("the process handle")?;
        Ok(&self.child)
    }
}

#[pymethods]
impl ChildProcess {
    /// Process id.
    #[getter]
    fn pid(&self) -> i32 {
        self.child.pid()
    }

    /// Field 22 of /proc/<pid>/stat.
    #[getter]
    fn start_time_ticks(&self) -> u64 {
        self.child.start_time_ticks()
    }

    /// The pidfd, borrowed.
    fn fileno(&self) -> Result<RawFd, Error> {
        Ok(self.checked()?.as_fd().as_raw_fd())
    }

    /// Exit status, negative for a signal, None while it runs.
    fn exit_status(&self) -> Result<Option<i32>, Error> {
        Ok(self.checked()?.exit_status())
    }

    /// Wait for its end; return the exit status.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> Result<i32, Error> {
        let child = self.checked()?;
        let timeout = optional_duration(timeout_s, "timeout_s")?;
        let started = Instant::now();
        let until = timeout.and_then(|timeout| started.checked_add(timeout));
        let wait_once = |limit: Option<Instant>| {
            let left = limit.map_or(Duration::MAX, |limit| limit.saturating_duration_since(Instant::now()));
            match child.wait(left) {
                Err(ProcessError::DeadlineExceeded { .. })
                    if until.is_none_or(|until| Instant::now() < until) =>
                {
                    None
                }
                result => Some(result),
            }
        };
        match in_slices(py, until, wait_once)? {
            // The slice's time stands in that error, the caller's is wanted.
            Err(ProcessError::DeadlineExceeded { pid, .. }) => {
                let timeout = timeout.unwrap_or_default();
                let text = ProcessError::DeadlineExceeded { pid, timeout }.to_string();
                Err(Error::deadline(text, timeout.as_secs_f64(), started.elapsed().as_secs_f64()))
            }
            result => Ok(result?),
        }
    }

    /// Send a signal through the pidfd; False when it has ended already.
    fn send_signal(&self, signal: i32) -> Result<bool, Error> {
        Ok(self.checked()?.send_signal(signal)?)
    }

    /// At most the last 64 KiB of its stderr.
    fn stderr_tail<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>, Error> {
        Ok(PyBytes::new(py, &self.checked()?.stderr_tail()))
    }

    /// What is kept of the console's output behind its first `position` bytes, and how many bytes came so far.
    fn console_since<'py>(
        &self,
        py: Python<'py>,
        position: u64,
    ) -> Result<(Bound<'py, PyBytes>, u64), Error> {
        let (data, position) = self.checked()?.console_since(position);
        Ok((PyBytes::new(py, &data), position))
    }

    /// At most the last 64 KiB of what came from the console descriptor.
    fn console_tail<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>, Error> {
        Ok(PyBytes::new(py, &self.checked()?.console_tail()))
    }
}

/// Start a program tied to this process.
#[pyfunction]
#[pyo3(
    signature = (argv, *, fds=Vec::new(), take_console_fd=None, env=None, cwd=None),
    text_signature = "(argv, *, fds=(), take_console_fd=None, env=None, cwd=None)"
)]
pub fn spawn(
    py: Python<'_>,
    argv: Vec<OsString>,
    fds: Vec<(RawFd, RawFd)>,
    take_console_fd: Option<RawFd>,
    env: Option<std::collections::BTreeMap<OsString, OsString>>,
    cwd: Option<OsString>,
) -> Result<ChildProcess, Error> {
    let console = take_console_fd.map(take_fd).transpose()?;
    let mut owned = Vec::with_capacity(fds.len());
    for (number, target) in fds {
        // A copy of our own: the caller may close its own while this call sleeps.
        let copy = borrow_fd(number)?.try_clone_to_owned().map_err(|error| {
            let target = format!("descriptor {number}");
            Error::host(
                format!("{target} can't be copied: {error}"),
                error.raw_os_error().unwrap_or(0),
                target,
            )
        })?;
        owned.push((copy, target));
    }
    // Read while attached: Python changes the environment only with the interpreter's lock held.
    let env = env.map_or_else(|| std::env::vars_os().collect(), |env| env.into_iter().collect());
    let request = SpawnRequest { argv, env, cwd, fds: owned, console };
    let child = py.detach(|| casemate_process::spawn(request))?;
    Ok(ChildProcess { owner: Owner::this_process(), child })
}
