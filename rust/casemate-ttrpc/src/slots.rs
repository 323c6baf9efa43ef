//! A client's open calls: bytes in, finished slots out. No I/O, no clock.
//!
//! A slot is the stream of its call; numbers are odd, increase and are never used again. What a hostile peer can make this
//! side hold is one frame in the decoder and one answer for each call that the caller opened.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::time::{Duration, Instant};

use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::error::TtrpcError;
use crate::frame::{
    FrameDecoder, FrameError, FrameHeader, FrameKind, HEADER_BYTES, MAX_DATA_BYTES, StreamId, StreamMap,
};
use crate::message::{Code, KeyValue, Request, Response, Status, sole_payload};

/// Most calls that may be open at once.
pub const MAX_OPEN_CALLS: usize = 65_536;

/// Most bytes that are kept for a peer that does not read.
pub const MAX_KEPT_BYTES: usize = 64 << 20;

/// Most bytes of answers' memory that are kept for the next ones.
const MAX_SPARE_BYTES: usize = 1 << 20;

/// Smaller memory is not worth keeping.
pub(crate) const MIN_SPARE_BYTES: usize = 4 << 10;

/// What is asked of the peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Call<'a> {
    /// Full name of the service (`grpc.AgentService`).
    pub service: &'a str,
    /// Name of the method.
    pub method: &'a str,
    /// The request message, encoded.
    pub payload: &'a [u8],
    /// Time until the answer is due, also told to the peer.
    pub timeout: Option<Duration>,
    /// Keys and values beside the request.
    pub metadata: &'a [(String, String)],
}

/// Bytes that wait for the socket, in whatever owns them.
pub struct Piece(Box<dyn AsRef<[u8]> + Send + Sync>);

impl Piece {
    /// Keeps `bytes` as they are.
    pub fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self(Box::new(bytes))
    }

    fn bytes(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Piece({} bytes)", self.bytes().len())
    }
}

/// How a call ended: the encoded response message, or why there is none.
pub type Answer = Result<Vec<u8>, TtrpcError>;

#[derive(Debug)]
enum Slot {
    Open { sent_at: Instant, timeout: Option<Duration> },
    Finished(Answer),
}

/// The table of one connection.
#[derive(Debug)]
pub struct ClientState {
    decoder: FrameDecoder,
    slots: StreamMap<Slot>,
    /// Deadlines, also of calls that are finished or cancelled since.
    deadlines: BinaryHeap<Reverse<(Instant, StreamId)>>,
    finished: Vec<StreamId>,
    next_stream: u32,
    kept: VecDeque<Piece>,
    /// Bytes of the first piece that are sent.
    kept_from: usize,
    kept_bytes: usize,
    /// Memory of answers that were taken. Taking large blocks from the allocator and giving them back for each answer makes
    /// it return them to the system each time, and their pages be made anew.
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
    broken: Option<TtrpcError>,
    dropped_answers_total: u64,
}

impl Default for ClientState {
    fn default() -> Self {
        Self::new()
    }
}

impl ClientState {
    /// A table without calls.
    #[must_use]
    pub fn new() -> Self {
        Self {
            decoder: FrameDecoder::new(),
            slots: StreamMap::default(),
            deadlines: BinaryHeap::new(),
            finished: Vec::new(),
            next_stream: 1,
            kept: VecDeque::new(),
            kept_from: 0,
            kept_bytes: 0,
            spare: Vec::new(),
            spare_bytes: 0,
            broken: None,
            dropped_answers_total: 0,
        }
    }

    /// Opens a slot. Returns it and the bytes that go out before `call.payload`, which is the end of the frame.
    ///
    /// # Errors
    /// [`TtrpcError::Frame`] when it does not fit into a frame, [`TtrpcError::Exhausted`] at a limit,
    /// [`TtrpcError::Closed`] or what broke the connection.
    pub fn open(&mut self, call: &Call<'_>, now: Instant) -> Result<(StreamId, Vec<u8>), TtrpcError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.slots.len() >= MAX_OPEN_CALLS || self.kept_bytes() > MAX_KEPT_BYTES {
            return Err(TtrpcError::Exhausted { open: self.slots.len(), kept_bytes: self.kept_bytes() });
        }
        let stream = StreamId(self.next_stream);
        let prefix = encode_prefix(call, stream)?;
        self.next_stream = self.next_stream.checked_add(2).ok_or_else(|| TtrpcError::Closed {
            reason: "all stream ids of the connection are used".into(),
        })?;
        if let Some(deadline) = call.timeout.and_then(|timeout| now.checked_add(timeout)) {
            if self.deadlines.len() > 2 * self.slots.len() + 64 {
                let slots = &self.slots;
                self.deadlines
                    .retain(|Reverse((_, stream))| matches!(slots.get(stream), Some(Slot::Open { .. })));
            }
            self.deadlines.push(Reverse((deadline, stream)));
        }
        self.slots.insert(stream, Slot::Open { sent_at: now, timeout: call.timeout });
        Ok((stream, prefix))
    }

    /// Bytes to send before anything else, piece by piece.
    pub fn kept(&self) -> impl Iterator<Item = &[u8]> {
        self.kept.iter().enumerate().map(|(index, piece)| {
            let from = if index == 0 { self.kept_from } else { 0 };
            &piece.bytes()[from..]
        })
    }

    /// How many bytes are kept.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// Keeps what a socket did not take of a piece, from byte `from` of it on; behind what is kept already.
    pub fn keep(&mut self, piece: Piece, from: usize) {
        let left = piece.bytes().len().saturating_sub(from);
        if left == 0 {
            return;
        }
        if self.kept.is_empty() {
            self.kept.push_back(piece);
            self.kept_from = from;
        } else if from == 0 {
            self.kept.push_back(piece);
        } else {
            self.kept.push_back(Piece::new(piece.bytes()[from..].to_vec()));
        }
        self.kept_bytes += left;
    }

    /// Says that the first `bytes` of what is kept are sent.
    pub fn sent(&mut self, bytes: usize) {
        self.kept_bytes -= bytes.min(self.kept_bytes);
        self.kept_from += bytes;
        while let Some(piece) = self.kept.front()
            && piece.bytes().len() <= self.kept_from
        {
            self.kept_from -= piece.bytes().len();
            self.kept.pop_front();
        }
        if self.kept.is_empty() {
            self.kept_from = 0;
        }
    }

    /// Room to read into; then call [`ClientState::received`].
    pub fn space(&mut self) -> &mut [u8] {
        self.decoder.space()
    }

    /// Gives the decoder away for a read that holds no lock; nothing may be received until it is back.
    pub(crate) fn lend_decoder(&mut self) -> FrameDecoder {
        std::mem::take(&mut self.decoder)
    }

    /// Takes the lent decoder back; a connection that broke meanwhile needs it no more.
    pub(crate) fn take_back_decoder(&mut self, decoder: FrameDecoder) {
        if self.broken.is_none() {
            self.decoder = decoder;
        }
    }

    /// Takes the first `bytes` of [`ClientState::space`] and finishes the slots whose answers are whole.
    pub fn received(&mut self, bytes: usize, now: Instant) {
        self.decoder.filled(bytes);
        loop {
            let (stream, answer) = match self.decoder.next_frame() {
                Ok(None) => return,
                Ok(Some(frame)) if frame.header.kind != FrameKind::Response => {
                    log::debug!("frame of kind {} ignored", frame.header.kind.wire());
                    continue;
                }
                Ok(Some(frame)) => {
                    let stream = frame.header.stream;
                    // An answer that nobody waits for is not even decoded.
                    let is_open = matches!(self.slots.get(&stream), Some(Slot::Open { .. }));
                    let answer = if is_open {
                        decode_answer(stream, frame.data, &mut self.spare, &mut self.spare_bytes)
                    } else {
                        Ok(Vec::new())
                    };
                    (stream, answer)
                }
                Err(error @ FrameError::TooLarge { stream, .. }) => {
                    (stream, Err(TtrpcError::Rpc(Status::new(Code::ResourceExhausted, error.to_string()))))
                }
            };
            self.answer(stream, answer, now);
        }
    }

    /// Takes the memory of an answer that is of no more use, for the next ones.
    pub fn recycle(&mut self, answer: Vec<u8>) {
        let bytes = answer.capacity();
        if (MIN_SPARE_BYTES..=MAX_SPARE_BYTES - self.spare_bytes).contains(&bytes) {
            self.spare_bytes += bytes;
            self.spare.push(answer);
        }
    }

    /// Copies received bytes in; as [`ClientState::received`].
    pub fn feed(&mut self, mut bytes: &[u8], now: Instant) {
        while !bytes.is_empty() {
            let space = self.space();
            let step = space.len().min(bytes.len());
            space[..step].copy_from_slice(&bytes[..step]);
            self.received(step, now);
            bytes = &bytes[step..];
        }
    }

    /// Finishes the slots whose time is over; returns when the next one is due.
    pub fn expire(&mut self, now: Instant) -> Option<Instant> {
        while let Some(Reverse((deadline, stream))) = self.deadlines.peek().copied() {
            match self.slots.get(&stream) {
                Some(Slot::Open { .. }) if deadline > now => return Some(deadline),
                Some(Slot::Open { sent_at, timeout }) => {
                    let error = TtrpcError::DeadlineExceeded {
                        timeout: timeout.unwrap_or_default(),
                        waited: now.saturating_duration_since(*sent_at),
                    };
                    self.finish(stream, Err(error));
                }
                _ => {}
            }
            self.deadlines.pop();
        }
        None
    }

    /// The answer of a finished slot, once; `None` while it is open.
    ///
    /// # Errors
    /// [`TtrpcError::UnknownSlot`] inside `Some` when there is no such slot.
    pub fn take(&mut self, slot: StreamId) -> Option<Answer> {
        match self.slots.get(&slot) {
            None => Some(Err(TtrpcError::UnknownSlot { slot })),
            Some(Slot::Open { .. }) => None,
            Some(Slot::Finished(_)) => match self.slots.remove(&slot) {
                Some(Slot::Finished(answer)) => Some(answer),
                _ => None,
            },
        }
    }

    /// Whether [`ClientState::take`] has something to say about the slot.
    #[must_use]
    pub fn is_ready(&self, slot: StreamId) -> bool {
        !matches!(self.slots.get(&slot), Some(Slot::Open { .. }))
    }

    /// The slots that finished since the last call.
    pub fn take_finished(&mut self) -> impl Iterator<Item = StreamId> + '_ {
        self.finished.drain(..)
    }

    /// Forgets the slot; false when there is none. A late answer is dropped and counted.
    pub fn cancel(&mut self, slot: StreamId) -> bool {
        self.slots.remove(&slot).is_some()
    }

    /// Ends the connection: every open slot finishes with `error`, which later calls get too. Returns the open slots.
    /// Does nothing when it is over already.
    pub fn break_with(&mut self, error: &TtrpcError) -> Vec<StreamId> {
        if self.broken.is_some() {
            return Vec::new();
        }
        self.broken = Some(error.clone());
        self.kept = VecDeque::new();
        (self.kept_from, self.kept_bytes) = (0, 0);
        self.deadlines.clear();
        self.decoder = FrameDecoder::new();
        let is_open =
            |(stream, slot): (&StreamId, &Slot)| matches!(slot, Slot::Open { .. }).then_some(*stream);
        let mut open: Vec<StreamId> = self.slots.iter().filter_map(is_open).collect();
        open.sort_unstable();
        for stream in &open {
            self.finish(*stream, Err(error.clone()));
        }
        open
    }

    /// Why the connection is over.
    #[must_use]
    pub fn broken(&self) -> Option<&TtrpcError> {
        self.broken.as_ref()
    }

    /// Slots that are open or not yet taken.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// Answers that came for slots already forgotten or past their deadline.
    #[must_use]
    pub fn dropped_answers_total(&self) -> u64 {
        self.dropped_answers_total
    }

    fn answer(&mut self, stream: StreamId, answer: Answer, now: Instant) {
        let Some(Slot::Open { sent_at, timeout }) = self.slots.get(&stream) else {
            self.dropped_answers_total += 1;
            return;
        };
        let waited = now.saturating_duration_since(*sent_at);
        let answer = match (answer, timeout) {
            // The peer keeps the same time and may be the first to say that it ran out: that is the same outcome.
            (Err(TtrpcError::Rpc(status)), Some(timeout))
                if status.code == Code::DeadlineExceeded as i32 && waited >= timeout.mul_f64(0.9) =>
            {
                Err(TtrpcError::DeadlineExceeded { timeout: *timeout, waited })
            }
            (answer, _) => answer,
        };
        self.finish(stream, answer);
    }

    fn finish(&mut self, stream: StreamId, answer: Answer) {
        self.slots.insert(stream, Slot::Finished(answer));
        self.finished.push(stream);
    }
}

fn decode_answer(stream: StreamId, data: &[u8], spare: &mut Vec<Vec<u8>>, spare_bytes: &mut usize) -> Answer {
    if let Some(payload) = sole_payload(data) {
        if payload.len() < MIN_SPARE_BYTES {
            return Ok(payload.to_vec());
        }
        let mut answer = spare.pop().unwrap_or_default();
        *spare_bytes -= answer.capacity();
        answer.clear();
        answer.extend_from_slice(payload);
        return Ok(answer);
    }
    let response = Response::decode(data).map_err(|_| TtrpcError::Malformed { stream })?;
    match response.status {
        Some(status) if !status.is_ok() => Err(TtrpcError::Rpc(status)),
        _ => Ok(response.payload),
    }
}

fn text_bytes(tag: u32, text: &str) -> usize {
    if text.is_empty() { 0 } else { key_len(tag) + encoded_len_varint(text.len() as u64) + text.len() }
}

/// Header and request message up to the payload's first byte. The payload comes last, out of field order, which protobuf
/// allows, so that it need not be copied.
fn encode_prefix(call: &Call<'_>, stream: StreamId) -> Result<Vec<u8>, TtrpcError> {
    // 0 means no limit on the wire: a time that is over already is told as the shortest there is.
    let nanos = |timeout: Duration| i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX).max(1);
    let pair = |(key, value): &(String, String)| KeyValue { key: key.clone(), value: value.clone() };
    let rest = Request {
        timeout_nano: call.timeout.map_or(0, nanos),
        metadata: call.metadata.iter().map(pair).collect(),
        ..Request::default()
    };
    let names = [(1, call.service), (2, call.method)];
    let names_bytes: usize = names.iter().map(|(tag, name)| text_bytes(*tag, name)).sum();
    let payload_bytes = call.payload.len();
    let payload_head =
        if payload_bytes == 0 { 0 } else { key_len(3) + encoded_len_varint(payload_bytes as u64) };
    let data_bytes = names_bytes + rest.encoded_len() + payload_head + payload_bytes;
    let too_large = FrameError::TooLarge { stream, data_bytes };
    if data_bytes > MAX_DATA_BYTES {
        return Err(too_large.into());
    }
    let wire_bytes = u32::try_from(data_bytes).map_err(|_| too_large)?;
    // Room for a small payload too, see the client's send.
    let mut prefix =
        Vec::with_capacity(HEADER_BYTES + data_bytes - payload_bytes + payload_bytes.min(1 << 10));
    let header = FrameHeader { data_bytes: wire_bytes, stream, kind: FrameKind::Request, flags: 0 };
    prefix.extend_from_slice(&header.encode());
    for (tag, name) in names.into_iter().filter(|(_, name)| !name.is_empty()) {
        encode_key(tag, WireType::LengthDelimited, &mut prefix);
        encode_varint(name.len() as u64, &mut prefix);
        prefix.extend_from_slice(name.as_bytes());
    }
    rest.encode_raw(&mut prefix);
    if payload_bytes > 0 {
        encode_key(3, WireType::LengthDelimited, &mut prefix);
        encode_varint(payload_bytes as u64, &mut prefix);
    }
    Ok(prefix)
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
