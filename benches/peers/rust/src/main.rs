//! Peers of the benchmark and of the interoperability tests: `casemate-peer COMMAND PATH`, with the path of a unix socket.
//!
//! - `bench-raw`, `bench-crate`: clients driven by `casemate bench rpc`. `raw` is the floor: frames made by hand, one write
//!   and one read a call. `crate` is the crate ttrpc, on one thread.
//! - `check-ours`, `check-crate`: make the calls of the interoperability tests and print each outcome as a line of JSON.
//! - `serve-ours`, `serve-crate`: answer such calls.

mod bench;
mod check;
mod crate_ttrpc;
mod raw;
mod serve_ours;

use std::os::unix::net::UnixStream;

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Service of the interoperability tests.
pub const SERVICE: &str = "interop.Test";

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [command, path] = arguments.as_slice() else {
        return Err("usage: casemate-peer COMMAND PATH".into());
    };
    match command.as_str() {
        "bench-raw" => bench::run(&mut raw::Raw::new(UnixStream::connect(path)?)),
        "bench-crate" => bench::run(&mut crate_ttrpc::Bench::connect(path)?),
        "check-ours" => check::run(&mut check::Ours::connect(path)?),
        "check-crate" => check::run(&mut crate_ttrpc::Check::connect(path)?),
        "serve-ours" => serve_ours::serve(path),
        "serve-crate" => crate_ttrpc::serve(path),
        _ => Err(format!("no command {command}").into()),
    }
}
