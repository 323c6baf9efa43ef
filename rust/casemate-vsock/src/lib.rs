//! Connections to and from a guest.
//!
//! Three ways, one outcome (a connected, blocking, close-on-exec stream socket): [`connect_vsock`] through the kernel,
//! [`connect_hybrid`] through the VMM's unix socket and its `CONNECT` greeting, [`accept`] when the guest connects. Each has
//! a deadline and ends early when the watched process (the VMM) ends. Nothing spins: refusals are retried with a growing pause.

mod accept;
mod error;
mod hybrid;
mod kernel;
mod patience;

pub use accept::accept;
pub use error::VsockError;
pub use hybrid::connect_hybrid;
pub use kernel::{Cid, Port, connect_vsock};
pub use patience::Patience;
