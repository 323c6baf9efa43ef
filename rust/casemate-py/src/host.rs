//! What the host is like, as far as only native code can tell.

use pyo3::prelude::*;

/// Kilohertz of the time stamp counter.
#[pyfunction]
pub fn tsc_khz(py: Python<'_>) -> Option<u64> {
    py.detach(casemate_process::tsc_khz)
}
