//! The one place where native errors become Python exceptions.
//!
//! The classes are defined in `casemate.errors`; they are looked up when an error is raised, so
//! importing the extension imports nothing else.

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
