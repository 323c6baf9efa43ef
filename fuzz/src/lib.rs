//! What is fuzzed: each function takes any bytes and panics when a promise is broken.

#[allow(dead_code, missing_docs)]
#[path = "../../rust/casemate-vhost-vsock/src/greeting.rs"]
mod greeting;

use std::time::{Duration, Instant};

use casemate_archive::{Layer, Limits, unpack_layer};
use casemate_proto::{RPCS, json};
use casemate_ttrpc::frame::{FrameDecoder, MAX_DATA_BYTES};
use casemate_ttrpc::message::{Request, Response};
use casemate_ttrpc::slots::ClientState;
use casemate_ttrpc::{Call, StreamId};
use casemate_vhost_vsock::packet::{HEADER_BYTES, Header};
use prost::Message;
use sha2::{Digest, Sha256};

/// A target by its name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target; the names are those of the directories of seeds.
pub const TARGETS: [Target; 6] = [
    ("ttrpc_frames", ttrpc_frames),
    ("ttrpc_client", ttrpc_client),
    ("protobuf", protobuf),
    ("vsock_packet", vsock_packet),
    ("greeting", hybrid_greeting),
    ("layer", layer),
];

/// Frames, or the streams of those that are refused.
fn frames_of(data: &[u8], step: usize) -> Vec<Result<(u32, Vec<u8>), u32>> {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    for piece in data.chunks(step.max(1)) {
        decoder.extend(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(Ok((frame.header.stream.0, frame.data.to_vec()))),
                Ok(None) => break,
                Err(error) => {
                    let casemate_ttrpc::frame::FrameError::TooLarge { stream, data_bytes } = error else {
                        continue;
                    };
                    assert!(data_bytes > MAX_DATA_BYTES);
                    frames.push(Err(stream.0));
                }
            }
        }
        assert!(decoder.pending_bytes() <= data.len());
    }
    frames
}

/// However the bytes arrive, the frames are the same.
pub fn ttrpc_frames(data: &[u8]) {
    let whole = frames_of(data, data.len());
    assert_eq!(whole, frames_of(data, 1));
    assert_eq!(whole, frames_of(data, 7));
}

/// A client's table: each open slot ends at most once, none that was not open, and all end with the connection.
pub fn ttrpc_client(data: &[u8]) {
    let mut state = ClientState::new();
    let now = Instant::now();
    let mut open: Vec<StreamId> = Vec::new();
    for number in 0..4u64 {
        let call = Call { service: "s", method: "m", timeout: Some(Duration::from_secs(number)), ..Call::default() };
        open.extend(state.open(&call, now).map(|(slot, _)| slot));
    }
    state.feed(data, now);
    let finished: Vec<StreamId> = state.take_finished().collect();
    for (index, slot) in finished.iter().enumerate() {
        assert!(open.contains(slot) && !finished[..index].contains(slot), "{slot} finished");
    }
    assert!(state.broken().is_none());
    state.break_with(&casemate_ttrpc::TtrpcError::Closed { reason: "over".into() });
    for slot in open {
        assert!(state.take(slot).is_some(), "{slot} has no end");
    }
}

/// Any bytes are a message or refused, and what was read is written as it can be read again.
pub fn protobuf(data: &[u8]) {
    if let Ok(request) = Request::decode(data) {
        assert_eq!(Request::decode(&request.encode_to_vec()[..]).as_ref(), Ok(&request));
    }
    if let Ok(response) = Response::decode(data) {
        assert_eq!(Response::decode(&response.encode_to_vec()[..]).as_ref(), Ok(&response));
    }
    for (service, method) in RPCS {
        if let Ok(document) = json::wire_to_json(service, method, data) {
            assert!(document.starts_with(b"{"), "{method}");
        }
        let refused = json::json_to_wire(service, method, data);
        assert!(data.is_empty() || data.iter().any(|byte| *byte == b'{') || refused.is_err(), "{method}");
    }
}

/// A header that was decoded is encoded to the same bytes.
pub fn vsock_packet(data: &[u8]) {
    let Some(head) = data.first_chunk::<HEADER_BYTES>() else { return };
    let header = Header::decode(head);
    assert_eq!(&header.encode()[..], &head[..]);
    let reply = header.reset_reply();
    assert_eq!((reply.src_port, reply.dst_port), (header.dst_port, header.src_port));
}

/// A whole line's length holds; what is malformed stays so, whatever follows.
pub fn hybrid_greeting(data: &[u8]) {
    use greeting::{Greeting, MAX_LINE_BYTES, parse};
    match parse(data) {
        Greeting::Connect { line_bytes, .. } => {
            assert!(line_bytes <= MAX_LINE_BYTES && data[line_bytes - 1] == b'\n');
            assert_eq!(parse(&data[..line_bytes]), parse(data));
        }
        Greeting::Malformed => assert_eq!(parse(&[data, b"\n1"].concat()), Greeting::Malformed),
        Greeting::Partial => assert!(data.len() < MAX_LINE_BYTES),
    }
}

/// A layer changes nothing outside its directory, and is held to its limits.
pub fn layer(data: &[u8]) {
    let Ok(scratch) = tempfile::tempdir() else { return };
    let (file, target) = (scratch.path().join("layer"), scratch.path().join("target"));
    let canary = scratch.path().join("canary");
    std::fs::write(&file, data).expect("written");
    std::fs::write(&canary, "untouched").expect("written");
    std::fs::create_dir(&target).expect("made");
    let hash: String = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect();
    let digest = format!("sha256:{hash}");
    let layer = Layer { path: &file, media_type: "", digest: &digest, diff_id: None };
    let limits = Limits { max_bytes: 1 << 20, max_entries: 100 };
    if let Ok(bytes) = unpack_layer(&layer, &target, limits, &mut |_| true) {
        assert!(bytes <= limits.max_bytes);
    }
    assert_eq!(std::fs::read(&canary).expect("still there"), b"untouched");
    let mut names: Vec<_> =
        std::fs::read_dir(scratch.path()).expect("listed").map(|entry| entry.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["canary", "layer", "target"]);
}
