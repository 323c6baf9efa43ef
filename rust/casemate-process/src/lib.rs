//! Child processes that end with this process, and a thread that watches them.
//!
//! [`spawn`] makes a child from one native thread that lives as long as the process: the parent-death signal is tied to the
//! thread that makes a child, so no other thread may do it. That thread also keeps bounded tails of the child's stderr and
//! console and reaps it, whether or not anybody holds its [`Child`].

mod child;
mod error;
mod launch;
mod tail;
mod tsc;
mod watch;

pub use child::{Child, UNKNOWN_STATUS};
pub use error::{ProcessError, Step};
pub use launch::SpawnRequest;
pub use tail::TAIL_BYTES;
pub use tsc::tsc_khz;
pub use watch::spawn;
