//! ttrpc for one connection.
//!
//! [`frame`] turns bytes into frames and frames into bytes and does no I/O; everything that
//! waits is built on it.
#![deny(unsafe_code)]

pub mod frame;
