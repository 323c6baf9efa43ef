//! ttrpc for one connection.
//!
//! [`frame`] turns bytes into frames and frames into bytes, [`message`] is what the frames carry, [`slots`] holds a client's
//! open calls; they do no I/O. [`client`] waits for answers and [`server`] answers requests, both on the calling thread:
//! the crate starts no thread.
#![deny(unsafe_code)]

pub mod client;
mod error;
pub mod frame;
pub mod message;
pub mod server;
pub mod slots;
mod wire;

pub use client::Client;
pub use error::TtrpcError;
pub use frame::StreamId;
pub use message::{Code, Status};
pub use server::{ConnectionHandle, Handler, Responder, ServerRequest, serve_connection};
pub use slots::Call;
