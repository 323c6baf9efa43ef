//! Layers onto a directory, through the public interface.
#![allow(clippy::unwrap_used)]

mod hostile;
mod layers;
mod support;
