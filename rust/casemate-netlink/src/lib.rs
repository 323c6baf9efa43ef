//! Network interfaces of the host. So far tap devices; they live as long as a descriptor of theirs is open.

mod error;
mod netns;
mod tap;

pub use error::NetlinkError;
pub use tap::{Tap, TapOptions, create_tap};
