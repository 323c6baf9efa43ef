#![allow(clippy::unwrap_used)]

use std::collections::HashMap as Map;

use proptest::prelude::*;

use super::*;
use crate::frame::encode_frame;

fn call(payload: &[u8]) -> Call<'_> {
    Call { service: "s", method: "m", payload, ..Call::default() }
}

fn open(state: &mut ClientState) -> StreamId {
    state.open(&call(b""), Instant::now()).unwrap().0
}

fn response(stream: StreamId, response: &Response) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_frame(&mut bytes, stream, FrameKind::Response, 0, &response.encode_to_vec()).unwrap();
    bytes
}

fn success(stream: StreamId, payload: &[u8]) -> Vec<u8> {
    response(stream, &Response { status: None, payload: payload.to_vec() })
}

fn failure(stream: StreamId, code: Code, text: &str) -> Vec<u8> {
    response(stream, &Response { status: Some(Status::new(code, text)), payload: Vec::new() })
}

#[test]
fn open_when_encoded_then_bytes_are_those_of_the_protocol() {
    let mut state = ClientState::new();
    let metadata = [("k".to_string(), "v".to_string())];
    let call = Call {
        service: "s",
        method: "m",
        payload: b"pp",
        timeout: Some(Duration::from_nanos(300)),
        metadata: &metadata,
    };
    let (stream, prefix) = state.open(&call, Instant::now()).unwrap();
    assert_eq!(stream, StreamId(1));
    let golden =
        b"\0\0\0\x15\0\0\0\x01\x01\0\x0a\x01s\x12\x01m\x20\xac\x02\x2a\x06\x0a\x01k\x12\x01v\x1a\x02";
    assert_eq!(prefix, golden);
    let whole = [&prefix[HEADER_BYTES..], &b"pp"[..]].concat();
    let request = Request::decode(&whole[..]).unwrap();
    assert_eq!((request.payload.as_slice(), request.timeout_nano), (&b"pp"[..], 300));
}

#[test]
fn open_when_called_again_then_streams_are_odd_and_increase() {
    let mut state = ClientState::new();
    let streams: Vec<u32> = (0..4).map(|_| open(&mut state).0).collect();
    assert_eq!(streams, [1, 3, 5, 7]);
}

#[test]
fn open_when_the_message_is_too_large_then_refused_and_no_slot_is_used() {
    let mut state = ClientState::new();
    let payload = vec![0; MAX_DATA_BYTES];
    let error = state.open(&call(&payload), Instant::now()).unwrap_err();
    assert!(matches!(error, TtrpcError::Frame(FrameError::TooLarge { .. })), "{error:?}");
    assert_eq!((state.slot_count(), open(&mut state)), (0, StreamId(1)));
}

#[test]
fn open_when_too_much_is_kept_or_open_then_exhausted() {
    let mut state = ClientState::new();
    state.keep(Piece::new(vec![0; MAX_KEPT_BYTES + 1]), 0);
    let error = state.open(&call(b""), Instant::now()).unwrap_err();
    assert_eq!(error, TtrpcError::Exhausted { open: 0, kept_bytes: MAX_KEPT_BYTES + 1 });
    state.sent(MAX_KEPT_BYTES + 1);
    for _ in 0..MAX_OPEN_CALLS {
        open(&mut state);
    }
    assert!(matches!(state.open(&call(b""), Instant::now()), Err(TtrpcError::Exhausted { .. })));
}

#[test]
fn open_when_stream_ids_are_used_up_then_closed_not_reused() {
    let mut state = ClientState::new();
    state.next_stream = u32::MAX;
    assert!(matches!(state.open(&call(b""), Instant::now()), Err(TtrpcError::Closed { .. })));
    assert_eq!(state.slot_count(), 0);
}

#[test]
fn keep_when_a_part_was_sent_then_the_rest_follows() {
    let mut state = ClientState::new();
    let kept = |state: &ClientState| state.kept().flatten().copied().collect::<Vec<u8>>();
    state.keep(Piece::new(b"abc"), 3);
    state.keep(Piece::new(b"def"), 1);
    assert_eq!(kept(&state), b"ef");
    state.sent(1);
    state.keep(Piece::new(b"gh"), 0);
    state.keep(Piece::new(b"ij"), 1);
    assert_eq!((kept(&state), state.kept_bytes()), (b"fghj".to_vec(), 4));
    state.sent(2);
    assert_eq!(kept(&state), b"hj");
    state.sent(2);
    assert_eq!((kept(&state), state.kept_bytes()), (Vec::new(), 0));
}

#[test]
fn received_when_answers_are_interleaved_then_each_slot_gets_its_own() {
    let mut state = ClientState::new();
    let (first, second) = (open(&mut state), open(&mut state));
    let bytes = [success(second, b"2"), success(first, b"1")].concat();
    state.feed(&bytes, Instant::now());
    assert_eq!(state.take_finished().collect::<Vec<_>>(), [second, first]);
    assert_eq!(state.take(first), Some(Ok(b"1".to_vec())));
    assert_eq!(state.take(second), Some(Ok(b"2".to_vec())));
    assert_eq!(state.take(second), Some(Err(TtrpcError::UnknownSlot { slot: second })));
}

#[test]
fn received_when_status_is_an_error_then_the_slot_has_it_and_ok_is_success() {
    let mut state = ClientState::new();
    let (bad, good) = (open(&mut state), open(&mut state));
    state.feed(&failure(bad, Code::NotFound, "no such container"), Instant::now());
    state.feed(&failure(good, Code::Ok, ""), Instant::now());
    let status = Status::new(Code::NotFound, "no such container");
    assert_eq!(state.take(bad), Some(Err(TtrpcError::Rpc(status))));
    assert_eq!(state.take(good), Some(Ok(Vec::new())));
}

#[test]
fn received_when_the_answer_is_too_large_then_that_slot_fails_and_the_next_comes() {
    let mut state = ClientState::new();
    let (large, next) = (open(&mut state), open(&mut state));
    let data_bytes = u32::try_from(MAX_DATA_BYTES + 1).unwrap();
    let header = FrameHeader { data_bytes, stream: large, kind: FrameKind::Response, flags: 0 };
    state.feed(&header.encode(), Instant::now());
    let Some(Err(TtrpcError::Rpc(status))) = state.take(large) else { panic!("not failed at once") };
    assert_eq!(status.code, Code::ResourceExhausted as i32);
    state.feed(&vec![0; MAX_DATA_BYTES + 1], Instant::now());
    state.feed(&success(next, b"on"), Instant::now());
    assert_eq!(state.take(next), Some(Ok(b"on".to_vec())));
}

#[test]
fn received_when_undecodable_or_of_another_kind_then_slot_fails_or_frame_is_ignored() {
    let mut state = ClientState::new();
    let slot = open(&mut state);
    let mut bytes = Vec::new();
    for kind in [FrameKind::Request, FrameKind::Data, FrameKind::Unknown(9)] {
        encode_frame(&mut bytes, slot, kind, 0, b"\xff").unwrap();
    }
    state.feed(&bytes, Instant::now());
    assert!(!state.is_ready(slot));
    let mut bytes = Vec::new();
    encode_frame(&mut bytes, slot, FrameKind::Response, 0, b"\xff").unwrap();
    state.feed(&bytes, Instant::now());
    assert_eq!(state.take(slot), Some(Err(TtrpcError::Malformed { stream: slot })));
}

#[test]
fn cancel_when_the_answer_comes_late_then_dropped_and_counted() {
    let mut state = ClientState::new();
    let slot = open(&mut state);
    assert!(state.cancel(slot));
    assert!(!state.cancel(slot));
    state.feed(&success(slot, b"late"), Instant::now());
    state.feed(&success(StreamId(99), b"never asked"), Instant::now());
    assert_eq!((state.dropped_answers_total(), state.slot_count()), (2, 0));
}

#[test]
fn expire_when_the_time_is_over_then_the_slot_fails_and_a_late_answer_is_counted() {
    let mut state = ClientState::new();
    let start = Instant::now();
    let timed = |s: u64| Call { timeout: Some(Duration::from_secs(s)), ..call(b"") };
    let (long, _) = state.open(&timed(9), start).unwrap();
    let (short, _) = state.open(&timed(2), start).unwrap();
    assert_eq!(state.expire(start), Some(start + Duration::from_secs(2)));
    let now = start + Duration::from_secs(3);
    assert_eq!(state.expire(now), Some(start + Duration::from_secs(9)));
    state.feed(&success(short, b"late"), now);
    assert_eq!(state.dropped_answers_total(), 1);
    let error =
        TtrpcError::DeadlineExceeded { timeout: Duration::from_secs(2), waited: Duration::from_secs(3) };
    assert_eq!(state.take(short), Some(Err(error)));
    state.cancel(long);
    assert_eq!(state.expire(now), None);
}

#[test]
fn received_when_the_peer_says_that_the_time_is_over_then_it_is_the_same_error_only_near_the_deadline() {
    let mut state = ClientState::new();
    let start = Instant::now();
    let timed = Call { timeout: Some(Duration::from_secs(10)), ..call(b"") };
    let ((early, _), (due, _)) = (state.open(&timed, start).unwrap(), state.open(&timed, start).unwrap());
    let second = |s: u64| start + Duration::from_secs(s);
    state.feed(&failure(early, Code::DeadlineExceeded, "inner"), second(1));
    state.feed(&failure(due, Code::DeadlineExceeded, "timeout"), second(10));
    assert!(matches!(state.take(early), Some(Err(TtrpcError::Rpc(_)))));
    assert!(matches!(state.take(due), Some(Err(TtrpcError::DeadlineExceeded { .. }))));
}

#[test]
fn break_with_when_slots_are_open_then_all_finish_and_finished_ones_keep_their_answer() {
    let mut state = ClientState::new();
    let slots: Vec<StreamId> = (0..3).map(|_| open(&mut state)).collect();
    state.feed(&success(slots[0], b"before"), Instant::now());
    let error = TtrpcError::Closed { reason: "gone".into() };
    assert_eq!(state.break_with(&error), slots[1..]);
    assert_eq!(state.break_with(&TtrpcError::Closed { reason: "second".into() }), []);
    assert_eq!(state.take(slots[0]), Some(Ok(b"before".to_vec())));
    assert_eq!(state.take(slots[1]), Some(Err(error.clone())));
    assert_eq!(state.open(&call(b""), Instant::now()).unwrap_err(), error);
}

proptest! {
    #[test]
    fn prefix_and_payload_when_decoded_then_equal_the_call(
        service in "[a-z.]{0,40}", method in "[A-Za-z]{0,30}", payload in prop::collection::vec(any::<u8>(), 0..300),
        timeout_nano in prop::option::of(1i64..i64::MAX), metadata in prop::collection::vec(("[a-z]{1,9}", ".{0,9}"), 0..4),
    ) {
        let timeout = timeout_nano.map(|nanos| Duration::from_nanos(nanos.unsigned_abs()));
        let call = Call { service: &service, method: &method, payload: &payload, timeout, metadata: &metadata };
        let (stream, mut bytes) = ClientState::new().open(&call, Instant::now()).unwrap();
        bytes.extend_from_slice(&payload);
        let mut decoder = FrameDecoder::new();
        decoder.extend(&bytes);
        let frame = decoder.next_frame().unwrap().unwrap();
        prop_assert_eq!(frame.header.stream, stream);
        let request = Request::decode(frame.data).unwrap();
        prop_assert_eq!(decoder.pending_bytes(), 0);
        prop_assert_eq!((request.service, request.method, request.payload), (service, method, payload));
        prop_assert_eq!(request.timeout_nano, timeout_nano.unwrap_or(0));
        let pairs: Vec<_> = request.metadata.into_iter().map(|pair| (pair.key, pair.value)).collect();
        prop_assert_eq!(pairs, metadata);
    }

    #[test]
    fn feed_when_any_bytes_come_in_any_pieces_then_no_panic_and_memory_is_bounded(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..40),
    ) {
        let mut state = ClientState::new();
        let slots: Vec<StreamId> = (0..4).map(|_| open(&mut state)).collect();
        for piece in &pieces {
            state.feed(piece, Instant::now());
        }
        prop_assert!(state.slot_count() == slots.len());
    }

    #[test]
    fn table_when_driven_at_random_then_agrees_with_a_model(
        steps in prop::collection::vec((0u8..5, 0usize..8), 1..80), cut in 1usize..50,
    ) {
        let mut state = ClientState::new();
        let mut model: Map<StreamId, Option<Vec<u8>>> = Map::new();
        let (mut known, mut dropped) = (Vec::new(), 0);
        for (step, pick) in steps {
            let picked = known.get(pick % known.len().max(1)).copied();
            match (step, picked) {
                (0, _) | (_, None) => {
                    let slot = open(&mut state);
                    known.push(slot);
                    model.insert(slot, None);
                }
                (1 | 2, Some(slot)) => {
                    let payload = vec![step; pick * 7];
                    for piece in success(slot, &payload).chunks(cut) {
                        state.feed(piece, Instant::now());
                    }
                    match model.get_mut(&slot) {
                        Some(answer @ None) => *answer = Some(payload),
                        _ => dropped += 1,
                    }
                }
                (3, Some(slot)) => prop_assert_eq!(state.cancel(slot), model.remove(&slot).is_some()),
                (_, Some(slot)) => {
                    let expected = match model.get(&slot) {
                        None => Some(Err(TtrpcError::UnknownSlot { slot })),
                        Some(None) => None,
                        Some(Some(payload)) => Some(Ok(payload.clone())),
                    };
                    prop_assert_eq!(state.take(slot), expected.clone());
                    if let Some(Ok(_)) = expected {
                        model.remove(&slot);
                    }
                }
            }
            prop_assert_eq!((state.slot_count(), state.dropped_answers_total()), (model.len(), dropped));
        }
        let open: Vec<StreamId> = {
            let mut open: Vec<_> = model.iter().filter(|(_, answer)| answer.is_none()).map(|(slot, _)| *slot).collect();
            open.sort_unstable();
            open
        };
        prop_assert_eq!(state.break_with(&TtrpcError::Closed { reason: "end".into() }), open);
    }
}
