//! Layers and compressed blocks.

use std::path::PathBuf;

use casemate_archive::{ArchiveError, Format, Layer, Limits};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use crate::error::{Attribute, Error};

#[pyfunction]
#[pyo3(signature = (path, directory, *, media_type, digest, diff_id=None, max_bytes=None, max_entries=None, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keywords of the Python function")]
pub fn unpack_layer(
    py: Python<'_>,
    path: PathBuf,
    directory: PathBuf,
    media_type: &str,
    digest: &str,
    diff_id: Option<&str>,
    max_bytes: Option<u64>,
    max_entries: Option<u64>,
    progress: Option<Py<PyAny>>,
) -> Result<u64, Error> {
    let defaults = Limits::default();
    let limits = Limits {
        max_bytes: max_bytes.unwrap_or(defaults.max_bytes),
        max_entries: max_entries.unwrap_or(defaults.max_entries),
    };
    let (media_type, digest, diff_id) =
        (media_type.to_owned(), digest.to_owned(), diff_id.map(str::to_owned));
    let mut raised: Option<PyErr> = None;
    let unpacked = py.detach(|| {
        let layer =
            Layer { path: &path, media_type: &media_type, digest: &digest, diff_id: diff_id.as_deref() };
        casemate_archive::unpack_layer(&layer, &directory, limits, &mut |bytes| {
            let told = Python::attach(|py| {
                py.check_signals()?;
                progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (bytes,)).map(drop))
            });
            told.map_err(|error| raised = Some(error)).is_ok()
        })
    });
    match (unpacked, raised) {
        (Err(ArchiveError::Stopped), Some(error)) => Err(error.into()),
        (Err(ArchiveError::Failpoint(failure)), _) => Err(failure.into()),
        (unpacked, _) => unpacked.map_err(|error| archive_error(&error, Some(digest))),
    }
}

#[pyfunction]
#[pyo3(signature = (data, *, format, max_bytes))]
pub fn decompress<'py>(
    py: Python<'py>,
    data: PyBackedBytes,
    format: &str,
    max_bytes: u64,
) -> Result<Bound<'py, PyBytes>, Error> {
    let known = match format {
        "lz4-legacy" => Format::Lz4Legacy,
        "zstd" => Format::Zstd,
        "gzip" => Format::Gzip,
        _ => {
            let text = format!("format is {format:?}, lz4-legacy, zstd or gzip is expected");
            return Err(invalid(text, "format"));
        }
    };
    let output = py.detach(|| casemate_archive::decompress(&data, known, max_bytes));
    let output = output.map_err(|error| invalid(error.to_string(), "data"))?;
    Ok(PyBytes::new(py, &output))
}

#[pyfunction]
#[pyo3(signature = (directory, path, *, max_bytes))]
pub fn read_tree_file(
    py: Python<'_>,
    directory: PathBuf,
    path: PathBuf,
    max_bytes: u64,
) -> Result<Option<Bound<'_, PyBytes>>, Error> {
    let content = py.detach(|| casemate_archive::read_file(&directory, &path, max_bytes));
    Ok(content.map_err(|error| archive_error(&error, None))?.map(|content| PyBytes::new(py, &content)))
}

#[pyfunction]
pub fn remove_tree(py: Python<'_>, path: PathBuf) -> Result<(), Error> {
    py.detach(|| casemate_archive::remove_tree(&path)).map_err(|error| archive_error(&error, None))
}

fn invalid(text: String, path: &str) -> Error {
    let attributes = vec![("path", Attribute::Text(path.to_owned()))];
    Error::Casemate { class: "InvalidConfigError", text, attributes }
}

fn archive_error(error: &ArchiveError, digest: Option<String>) -> Error {
    let text = error.to_string();
    match error {
        ArchiveError::Host { errno: nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT, .. } => {
            Error::Casemate { class: "ResourceExhaustedError", text, attributes: Vec::new() }
        }
        ArchiveError::Host { target, errno, .. } => {
            let attributes = vec![
                ("errno", Attribute::Integer(i64::from(*errno as i32))),
                ("target", Attribute::Text(target.clone())),
            ];
            Error::Casemate { class: "HostError", text, attributes }
        }
        _ => {
            let text = match &digest {
                Some(digest) => format!("layer {digest}: {text}"),
                None => text,
            };
            let attributes = digest.map(|digest| ("digest", Attribute::Text(digest)));
            Error::Casemate { class: "ImageError", text, attributes: attributes.into_iter().collect() }
        }
    }
}
