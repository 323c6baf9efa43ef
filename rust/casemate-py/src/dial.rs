//! `connect_hybrid`, `connect_vsock` and `accept`.

use std::os::fd::{AsFd, IntoRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use casemate_vsock::{Cid, Patience, Port, VsockError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::wait::{borrow_fd, duration, handles_signals, watched_fd};

/// Connect through a hybrid vsock socket; return the socket.
#[pyfunction]
#[pyo3(signature = (path, port, *, timeout_s, watch=None))]
pub fn connect_hybrid(
    py: Python<'_>,
    path: PathBuf,
    port: u32,
    timeout_s: f64,
    watch: Option<&Bound<'_, PyAny>>,
) -> Result<RawFd, Error> {
    patiently(py, timeout_s, watch, |patience| casemate_vsock::connect_hybrid(&path, Port(port), patience))
}

/// Connect over AF_VSOCK; return the socket.
#[pyfunction]
#[pyo3(signature = (cid, port, *, timeout_s, watch=None))]
pub fn connect_vsock(
    py: Python<'_>,
    cid: u32,
    port: u32,
    timeout_s: f64,
    watch: Option<&Bound<'_, PyAny>>,
) -> Result<RawFd, Error> {
    patiently(py, timeout_s, watch, |patience| casemate_vsock::connect_vsock(Cid(cid), Port(port), patience))
}

/// Accept one connection on the borrowed listener; return the new socket.
#[pyfunction]
#[pyo3(signature = (listener_fd, *, timeout_s, watch=None))]
pub fn accept(
    py: Python<'_>,
    listener_fd: RawFd,
    timeout_s: f64,
    watch: Option<&Bound<'_, PyAny>>,
) -> Result<RawFd, Error> {
    let listener = borrow_fd(listener_fd)?;
    patiently(py, timeout_s, watch, |patience| casemate_vsock::accept(listener, patience))
}

fn patiently(
    py: Python<'_>,
    timeout_s: f64,
    watch: Option<&Bound<'_, PyAny>>,
    attempt: impl FnOnce(Patience<'_>) -> Result<OwnedFd, VsockError> + Send,
) -> Result<RawFd, Error> {
    let timeout = duration(timeout_s, "timeout_s")?;
    let watched = watch.map(watched_fd).transpose()?;
    let started = Instant::now();
    let raised = Mutex::new(None);
    let result = py.detach(|| {
        let is_interrupted = || {
            // Attached for the look only; no lock is held and the attempt waits meanwhile.
            handles_signals()
                && Python::attach(|py| py.check_signals())
                    .is_err_and(|error| raised.lock().is_ok_and(|mut raised| raised.replace(error).is_none()))
        };
        let watch = watched.as_ref().map(AsFd::as_fd);
        attempt(Patience { timeout, watch, is_interrupted: &is_interrupted })
    });
    if let Some(error) = raised.into_inner().ok().flatten() {
        return Err(error.into());
    }
    match result {
        Ok(socket) => Ok(socket.into_raw_fd()),
        Err(error @ VsockError::DeadlineExceeded { .. }) => {
            Err(Error::deadline(error.to_string(), timeout_s, started.elapsed().as_secs_f64()))
        }
        Err(error) => Err(error.into()),
    }
}
