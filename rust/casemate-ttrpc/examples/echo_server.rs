//! Answers every request with its own payload: the server that `benches/rpc.py` measures clients against.
//!
//! `echo_server PATH` listens on the unix socket PATH and serves each connection on a thread of its own, until its standard
//! input ends.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use casemate_ttrpc::{Handler, Responder, ServerRequest, serve_connection};

struct Echo;

impl Handler for Echo {
    fn handle(&self, request: ServerRequest, responder: Responder) {
        responder.ok(request.payload);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: echo_server PATH")?;
    let listener = UnixListener::bind(path)?;
    println!("ready");
    std::thread::spawn(move || {
        let handler: Arc<dyn Handler> = Arc::new(Echo);
        for stream in listener.incoming().flatten() {
            let handler = Arc::clone(&handler);
            std::thread::spawn(move || serve_connection(stream.into(), &handler));
        }
    });
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
