//! The extension module `casemate._core`: conversions, error mapping and waits, no policy.

mod archive;
mod child;
mod connection;
mod dial;
mod echo;
mod error;
mod failpoint;
mod host;
mod network;
mod vsock;
mod wait;

use pyo3::prelude::*;

/// Native parts of casemate. `_core.pyi` is the manual.
#[pymodule]
#[pyo3(name = "_core")]
mod core {
    #[pymodule_export]
    use super::child::{ChildProcess, spawn};
    #[pymodule_export]
    use super::connection::Connection;
    #[pymodule_export]
    use super::dial::{accept, connect_hybrid, connect_vsock};
    #[pymodule_export]
    use super::echo::serve_echo;
    #[pymodule_export]
    use super::failpoint::{FailpointScript, set_failpoints};
    #[pymodule_export]
    use super::host::tsc_khz;
    #[pymodule_export]
    use super::network::create_tap;
    #[pymodule_export]
    use super::vsock::VsockBackend;
    use super::{Bound, PyModule, PyModuleMethods, PyResult};
    #[pymodule_export]
    use crate::archive::{decompress, read_tree_file, remove_tree, unpack_layer};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::wait::count_forks()?;
        module.add("__optimized__", !cfg!(debug_assertions))?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
