//! ttrpc for one connection.
//!
//! [`frame`] turns bytes into frames and frames into bytes, [`message`] is what the frames carry; both do no I/O.
//! [`server`] answers requests on the calling thread.
#![deny(unsafe_code)]

mod error;
pub mod frame;
pub mod message;
pub mod server;
mod wire;

pub use error::TtrpcError;
pub use message::{Code, Status};
pub use server::{ConnectionHandle, Handler, Responder, ServerRequest, serve_connection};
