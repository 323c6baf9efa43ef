//! The device side of virtio-vsock over vhost-user, for hosts without `/dev/vhost-vsock`.
//!
//! [`VsockBackend`] serves one guest on one thread. Programs of the host reach the guest through a hybrid unix socket:
//! they write `CONNECT <port>\n` and read `OK <n>\n`; a guest's connection to port P of the host (context id 2) goes to
//! the unix socket `<path>_P`. The design note is `docs/design/vsock-backend.md`.
//!
//! The guest is not trusted: whatever it writes into rings and packets can end its own connections and nothing else. The
//! VMM is trusted with the vhost-user protocol, the memory it shares must not shrink.

mod backend;
mod backlog;
mod chain;
mod device;
mod endpoint;
mod error;
mod greeting;
mod mux;
mod outlet;
pub mod packet;
mod ring;
mod server;
mod stats;
mod stream;
mod unix;

pub use backend::VsockBackend;
pub use error::VhostVsockError;
pub use mux::{CROWD, CROWDED_WINDOW_BYTES, MAX_CONNECTIONS, MAX_RESETS, Timeouts, WINDOW_BYTES};
pub use stats::Stats;
