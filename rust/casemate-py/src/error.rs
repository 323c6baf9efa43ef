//! The one place where native errors become Python exceptions.
//!
//! The classes are defined in `casemate.errors`; they are looked up when an error is raised, so
//! importing the extension imports nothing else.

use std::borrow::Cow;

use casemate_failpoint::Failure;
use casemate_netlink::NetlinkError;
use casemate_process::ProcessError;
use casemate_proto::json::ProtoError;
use casemate_ttrpc::{Code, TtrpcError};
use casemate_vsock::VsockError;
use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Every way in which a call into the extension can fail.
#[derive(Debug)]
pub enum Error {
    /// A Python exception that passes through.
    Python(PyErr),
    /// A class of `casemate.errors` with its text and attributes.
    Casemate {
        /// Class name in `casemate.errors`.
        class: &'static str,
        /// Text of the exception.
        text: String,
        /// Keyword attributes (strings and integers only).
        attributes: Vec<(&'static str, Attribute)>,
    },
}

/// A value of an exception's attribute.
#[derive(Debug, Clone)]
pub enum Attribute {
    /// Text.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// Seconds.
    Seconds(f64),
}

impl Error {
    fn new(class: &'static str, text: impl Into<String>, attributes: Vec<(&'static str, Attribute)>) -> Self {
        Self::Casemate { class, text: text.into(), attributes }
    }

    /// A system call of the host failed on `target`.
    pub fn host(text: impl Into<String>, errno: i32, target: impl Into<String>) -> Self {
        let attributes =
            vec![("errno", Attribute::Integer(errno.into())), ("target", Attribute::Text(target.into()))];
        Self::new("HostError", text, attributes)
    }

    /// An argument that can't be used.
    pub fn invalid(text: impl Into<String>, path: &str) -> Self {
        Self::new("InvalidConfigError", text, vec![("path", Attribute::Text(path.into()))])
    }

    /// The time is over.
    pub fn deadline(text: impl Into<String>, deadline_s: f64, waited_s: f64) -> Self {
        let attributes =
            vec![("deadline_s", Attribute::Seconds(deadline_s)), ("waited_s", Attribute::Seconds(waited_s))];
        Self::new("DeadlineExceededError", text, attributes)
    }

    /// A defect, ours or of the caller's use of the native module.
    pub fn internal(text: impl Into<String>) -> Self {
        Self::new("InternalError", text, Vec::new())
    }

    /// The connection to the agent is no more.
    pub fn agent_connection(text: impl Into<String>) -> Self {
        Self::new("AgentConnectionError", text, Vec::new())
    }

    fn agent_rpc(method: &str, code: i32, details: &str) -> Self {
        let details = cut(details);
        let name = Code::try_from(code).map_or_else(|_| format!("code {code}"), |code| format!("{code:?}"));
        let attributes = vec![
            ("method", Attribute::Text(method.into())),
            ("code", Attribute::Integer(code.into())),
            ("details", Attribute::Text(details.clone().into_owned())),
        ];
        Self::new("AgentRpcError", format!("{method}: {name}: {details}"), attributes)
    }

    /// How a call of `method` ended.
    pub fn from_call(method: &str, error: TtrpcError) -> Self {
        match error {
            TtrpcError::Failpoint(failure) => failure.into(),
            TtrpcError::Rpc(status) => Self::agent_rpc(method, status.code, &status.message),
            TtrpcError::Malformed { .. } => {
                Self::agent_rpc(method, Code::DataLoss as i32, &error.to_string())
            }
            TtrpcError::DeadlineExceeded { timeout, waited } => {
                Self::deadline(format!("{method}: {error}"), timeout.as_secs_f64(), waited.as_secs_f64())
            }
            TtrpcError::Frame(error) => Self::invalid(format!("{method}: {error}"), "request"),
            TtrpcError::Exhausted { .. } => {
                Self::new("ResourceExhaustedError", format!("{method}: {error}"), Vec::new())
            }
            TtrpcError::UnknownSlot { .. } => {
                let attributes = vec![
                    ("state", Attribute::Text("closed".into())),
                    ("wanted", Attribute::Text("open".into())),
                ];
                Self::new("InvalidStateError", error.to_string(), attributes)
            }
            error => Self::agent_connection(format!("{method}: {error}")),
        }
    }

    /// A document that is no request, or an answer that is no message.
    pub fn from_proto(method: &str, error: &ProtoError) -> Self {
        match error {
            ProtoError::UnknownRpc { .. } => Self::invalid(error.to_string(), "method"),
            ProtoError::Document { line, column, source, .. } if *line > 0 => {
                Self::invalid(format!("{method}: {source}"), &format!("line {line}, column {column}"))
            }
            ProtoError::Document { source, .. } => Self::invalid(format!("{method}: {source}"), ""),
            error => Self::agent_rpc(method, Code::DataLoss as i32, &error.to_string()),
        }
    }
}

/// A peer's text as it may stand in an error: without what is more than anybody reads.
fn cut(text: &str) -> Cow<'_, str> {
    const MAX_BYTES: usize = 64 << 10;
    if text.len() <= MAX_BYTES {
        return Cow::Borrowed(text);
    }
    let end = (0..=MAX_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    Cow::Owned(format!("{}… (of {} bytes)", &text[..end], text.len()))
}

impl From<ProcessError> for Error {
    fn from(error: ProcessError) -> Self {
        let text = error.to_string();
        match error {
            ProcessError::Failpoint(failure) => failure.into(),
            ProcessError::Spawn { program, errno, .. } => Self::host(text, errno as i32, program),
            ProcessError::Io { op, errno } => Self::host(text, errno as i32, op),
            ProcessError::DeadlineExceeded { timeout, .. } | ProcessError::SpawnTimedOut { timeout, .. } => {
                Self::deadline(text, timeout.as_secs_f64(), timeout.as_secs_f64())
            }
            ProcessError::Invalid { .. } => Self::invalid(text, "argv"),
            _ => Self::internal(text),
        }
    }
}

impl From<NetlinkError> for Error {
    fn from(error: NetlinkError) -> Self {
        let text = error.to_string();
        match error {
            NetlinkError::System { target, errno, .. } => Self::host(text, errno as i32, target),
            NetlinkError::Name { .. } => Self::invalid(text, "name"),
            _ => Self::internal(text),
        }
    }
}

impl From<VsockError> for Error {
    fn from(error: VsockError) -> Self {
        let text = error.to_string();
        match error {
            VsockError::Failpoint(failure) => failure.into(),
            VsockError::Io { target, errno, .. } => Self::host(text, errno as i32, target),
            VsockError::DeadlineExceeded { timeout, .. } => {
                Self::deadline(text, timeout.as_secs_f64(), timeout.as_secs_f64())
            }
            VsockError::WatchEnded { .. } => Self::agent_connection(text),
            _ => Self::internal(text),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let Some(text) = failure.text else {
            // What an interrupted wait ends with depends on who waits, and Python knows that.
            return Self::Python(Python::attach(|py| interruption(py).unwrap_or_else(|error| error)));
        };
        let class = match failure.point {
            "native.spawn" | "native.unpack" | "native.unpack_write" => "HostError",
            _ => "AgentConnectionError",
        };
        Self::new(class, text, vec![("op", Attribute::Text(failure.point.into()))])
    }
}

fn interruption(py: Python<'_>) -> PyResult<PyErr> {
    let module = py.import("casemate.observe.failpoints")?;
    Ok(PyErr::from_value(module.call_method0("interruption")?))
}

impl From<PyErr> for Error {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Python(error) => error,
            Error::Casemate { class, text, attributes } => {
                Python::attach(|py| build(py, class, &text, &attributes).unwrap_or_else(|error| error))
            }
        }
    }
}

fn build(py: Python<'_>, class: &str, text: &str, attributes: &[(&str, Attribute)]) -> PyResult<PyErr> {
    let class = py.import("casemate.errors")?.getattr(class).map_err(|error| {
        PyImportError::new_err(format!("casemate.errors lacks a class that the extension raises: {error}"))
    })?;
    let keywords = PyDict::new(py);
    for (name, value) in attributes {
        match value {
            Attribute::Text(text) => keywords.set_item(name, text)?,
            Attribute::Integer(number) => keywords.set_item(name, number)?,
            Attribute::Seconds(seconds) => keywords.set_item(name, seconds)?,
        }
    }
    Ok(PyErr::from_value(class.call((text,), Some(&keywords))?))
}
