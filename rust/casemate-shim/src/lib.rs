//! What holds one sandbox while nobody else does: its VMM, its vsock device, its containers' output and their ends.
//!
//! [`Keeper`] is one epoll thread over a control socket, the VMM's pidfd and a connection of its own to the agent; beside it
//! run the vsock back end's thread and the one that makes and reaps children. The program `casemate-keeper` is this and
//! nothing else; a shim is the keeper of its pod with another front. The design note is `docs/design/keeper.md`.
//!
//! The guest is not trusted: everything that it can make grow has a bound, and what it says ends up in files of a bounded
//! size. Those who reach the control socket are the sandbox's own user.

mod agent;
mod clock;
mod container;
mod control;
mod daemon;
mod error;
mod files;
mod keeper;
mod log_file;
mod logger;
mod peer;
mod record;
mod vmm;

pub use control::{Limits, MAX_LINE_BYTES};
pub use daemon::detach;
pub use error::ShimError;
pub use keeper::Keeper;
pub use log_file::{LogFile, MAX_ENTRY_BYTES};
pub use logger::log_to;
pub use record::{EndRecord, ExitCause, ExitRecord, TAIL_BYTES};
