//! `VsockBackend`: the vhost-user-vsock device in this process.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;

use casemate_vhost_vsock::{Stats, VhostVsockError};
use pyo3::prelude::*;

use crate::error::{Attribute, Error};

/// A vhost-user-vsock device served in this process. `_core.pyi` is the manual.
#[pyclass(frozen, module = "casemate._core")]
pub struct VsockBackend {
    backend: casemate_vhost_vsock::VsockBackend,
    owner_pid: u32,
}

impl VsockBackend {
    fn check_process(&self) -> Result<(), Error> {
        if std::process::id() == self.owner_pid {
            return Ok(());
        }
        Err(Error::Casemate {
            class: "InternalError",
            text: format!("a VsockBackend of process {} is used in another process", self.owner_pid),
            attributes: Vec::new(),
        })
    }
}

#[pymethods]
impl VsockBackend {
    #[new]
    fn new(py: Python<'_>, take_vhost_fd: RawFd, uds_path: PathBuf, guest_cid: u32) -> Result<Self, Error> {
        // SAFETY: no pointers are passed; a number that is no descriptor is an error.
        if unsafe { libc::fcntl(take_vhost_fd, libc::F_GETFD) } < 0 {
            return Err(Error::Casemate {
                class: "HostError",
                text: format!("take_vhost_fd {take_vhost_fd} is not an open descriptor"),
                attributes: vec![
                    ("errno", Attribute::Integer(i64::from(libc::EBADF))),
                    ("target", Attribute::Text("take_vhost_fd".to_owned())),
                ],
            });
        }
        // SAFETY: the descriptor is open, and the caller gives it up by the contract of the name.
        let vhost = unsafe { OwnedFd::from_raw_fd(take_vhost_fd) };
        let backend = py
            .detach(|| casemate_vhost_vsock::VsockBackend::start(vhost, &uds_path, guest_cid))
            .map_err(to_error)?;
        Ok(Self { backend, owner_pid: std::process::id() })
    }

    fn error(&self) -> Result<Option<String>, Error> {
        self.check_process()?;
        Ok(self.backend.error())
    }

    fn stats(&self) -> Result<BTreeMap<&'static str, u64>, Error> {
        self.check_process()?;
        let Stats {
            connections_open,
            connections_total,
            packets_in_total,
            packets_out_total,
            packets_dropped_total,
            resets_total,
            bytes_in_total,
            bytes_out_total,
        } = self.backend.stats();
        Ok(BTreeMap::from([
            ("connections_open", connections_open),
            ("connections_total", connections_total),
            ("packets_in_total", packets_in_total),
            ("packets_out_total", packets_out_total),
            ("packets_dropped_total", packets_dropped_total),
            ("resets_total", resets_total),
            ("bytes_in_total", bytes_in_total),
            ("bytes_out_total", bytes_out_total),
        ]))
    }

    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        self.check_process()?;
        py.detach(|| self.backend.close()).map_err(to_error)
    }
}

fn to_error(error: VhostVsockError) -> Error {
    let text = error.to_string();
    match error {
        VhostVsockError::System { target, source, .. } => Error::Casemate {
            class: "HostError",
            text: format!("{text}: {source}"),
            attributes: vec![
                ("errno", Attribute::Integer(i64::from(source.raw_os_error().unwrap_or(0)))),
                ("target", Attribute::Text(target)),
            ],
        },
        VhostVsockError::ContextId { .. } => Error::Casemate {
            class: "InvalidConfigError",
            text,
            attributes: vec![("path", Attribute::Text("guest_cid".to_owned()))],
        },
        VhostVsockError::StillRunning { waited_s } => Error::Casemate {
            class: "DeadlineExceededError",
            text,
            attributes: vec![
                ("deadline_s", Attribute::Seconds(waited_s as f64)),
                ("waited_s", Attribute::Seconds(waited_s as f64)),
            ],
        },
        other => Error::Casemate { class: "InternalError", text: other.to_string(), attributes: Vec::new() },
    }
}
