//! `serve_echo`: the server with a handler that answers every request with its own payload.

use std::os::fd::RawFd;
use std::sync::Arc;

use casemate_ttrpc::{Handler, Responder, ServerRequest, serve_connection};
use pyo3::prelude::*;

use crate::error::Error;
use crate::wait::take_fd;

struct Echo;

impl Handler for Echo {
    fn handle(&self, request: ServerRequest, responder: Responder) {
        responder.ok(request.payload);
    }
}

/// Serve one connection until its peer closes it.
#[pyfunction]
#[pyo3(signature = (take_fd))]
pub fn serve_echo(py: Python<'_>, take_fd: RawFd) -> Result<(), Error> {
    let socket = self::take_fd(take_fd)?;
    let handler: Arc<dyn Handler> = Arc::new(Echo);
    py.detach(|| serve_connection(socket, &handler)).map_err(|error| Error::from_call("serve_echo", error))
}
