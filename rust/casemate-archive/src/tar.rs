//! Tar streams: ustar, old GNU, PAX and V7 headers; long names, extended attributes, holes.
//!
//! Written here, not taken from a crate, because a layer is hostile input: the length of every extension header is
//! bounded before it is read, a PAX `size` replaces the header's, and all four ways to write holes are understood.

mod header;
mod pax;
mod reader;
mod sparse;

pub(crate) use header::Kind;
pub(crate) use reader::{Entry, TarReader};

/// Seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Timestamp {
    pub seconds: i64,
    pub nanoseconds: u32,
}

pub(crate) const BLOCK_BYTES: usize = 512;
