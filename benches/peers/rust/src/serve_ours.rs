//! Our server with the methods of the interoperability tests.

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use casemate_ttrpc::{Handler, Responder, ServerRequest, Status, serve_connection};

use crate::check::{unwrap, wrap};
use crate::{Failure, SERVICE};

struct Interop;

impl Handler for Interop {
    fn handle(&self, request: ServerRequest, responder: Responder) {
        if request.service != SERVICE {
            return responder.error(Status::unknown_service(&request.service));
        }
        match request.method.as_str() {
            "Echo" => responder.ok(request.payload),
            "Fail" => responder.error(status_of(&String::from_utf8_lossy(&unwrap(&request.payload)))),
            // At the caller's deadline the server itself answers.
            "Slow" => std::mem::forget(responder),
            "Metadata" => {
                let values = request.metadata.iter().filter(|(key, _)| key == "trace");
                let values: Vec<&str> = values.map(|(_, value)| value.as_str()).collect();
                responder.ok(wrap(values.join(",").as_bytes()));
            }
            other => responder.error(Status::unknown_method(other)),
        }
    }
}

/// The status that `CODE text` asks for.
pub fn status_of(text: &str) -> Status {
    let (code, text) = text.split_once(' ').unwrap_or(("2", text));
    Status { code: code.parse().unwrap_or(2), message: text.into(), details: Vec::new() }
}

/// Serves each connection on a thread of its own, for ever.
pub fn serve(path: &str) -> Result<(), Failure> {
    let listener = UnixListener::bind(path)?;
    println!("ready");
    let handler: Arc<dyn Handler> = Arc::new(Interop);
    for stream in listener.incoming().flatten() {
        let handler = Arc::clone(&handler);
        std::thread::spawn(move || serve_connection(stream.into(), &handler));
    }
    Ok(())
}
