//! The extension module `casemate._core`: conversions, error mapping and waits, no policy.

mod archive;
mod error;
mod vsock;

use pyo3::prelude::*;

/// Native parts of casemate. `_core.pyi` is the manual.
#[pymodule]
#[pyo3(name = "_core")]
mod core {
    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    use crate::archive::{decompress, read_tree_file, remove_tree, unpack_layer};
    #[pymodule_export]
    use super::vsock::VsockBackend;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
