//! The ttrpc frame: a ten-byte header and its data. No I/O, no allocation beyond the buffer.
//!
//! Source: containerd/ttrpc `PROTOCOL.md`, sections «Message Frame» and «Message Flags».

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

/// Bytes in a frame header.
pub const HEADER_BYTES: usize = 10;

/// Most bytes of data that one frame may carry (4 MiB); both ends refuse more.
pub const MAX_DATA_BYTES: usize = 4 << 20;

/// The stream a frame belongs to. Streams opened by a client have odd numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u32);

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A map by stream, for a side that chooses the streams itself: its hash is one multiplication and resists nobody.
pub type StreamMap<V> = HashMap<StreamId, V, BuildHasherDefault<StreamHasher>>;

/// See [`StreamMap`].
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamHasher(u64);

impl Hasher for StreamHasher {
    fn write_u32(&mut self, number: u32) {
        // The golden ratio spreads neighbours over all bits.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What a frame carries. Numbers not listed are kept, so that a reader can skip them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameKind {
    /// 1: a request message.
    Request,
    /// 2: a response message.
    Response,
    /// 3: data of an open stream.
    Data,
    /// A number that this version does not know.
    Unknown(u8),
}

impl FrameKind {
    /// The number on the wire.
    #[must_use]
    pub fn wire(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Data => 3,
            Self::Unknown(number) => number,
        }
    }

    /// The kind for a number on the wire.
    #[must_use]
    pub fn from_wire(number: u8) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Data,
            other => Self::Unknown(other),
        }
    }
}

/// Flag: the sender will send nothing more on this stream.
pub const FLAG_REMOTE_CLOSED: u8 = 0x01;
/// Flag: the stream stays open for data after the request.
pub const FLAG_REMOTE_OPEN: u8 = 0x02;
/// Flag: this data frame has no data.
pub const FLAG_NO_DATA: u8 = 0x04;

/// A frame header as it stands on the wire: length, stream (both big-endian), type, flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of data behind the header.
    pub data_bytes: u32,
    /// The stream.
    pub stream: StreamId,
    /// What the data is.
    pub kind: FrameKind,
    /// `FLAG_*` bits.
    pub flags: u8,
}

impl FrameHeader {
    /// The ten bytes of this header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.data_bytes.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.0.to_be_bytes());
        bytes[8] = self.kind.wire();
        bytes[9] = self.flags;
        bytes
    }

    /// The header in these ten bytes; every value is a header, lengths are not judged here.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            data_bytes: u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            stream: StreamId(u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])),
            kind: FrameKind::from_wire(bytes[8]),
            flags: bytes[9],
        }
    }
}

/// A frame that breaks the protocol's limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The data is longer than [`MAX_DATA_BYTES`].
    #[error("frame of stream {stream} announces {data_bytes} bytes, at most {MAX_DATA_BYTES} are allowed")]
    TooLarge {
        /// The stream named in the header.
        stream: StreamId,
        /// The length that was announced or handed in.
        data_bytes: usize,
    },
}

/// Appends one frame to `out`.
///
/// # Errors
/// [`FrameError::TooLarge`] when `data` is longer than [`MAX_DATA_BYTES`]; `out` is unchanged then.
pub fn encode_frame(
    out: &mut Vec<u8>,
    stream: StreamId,
    kind: FrameKind,
    flags: u8,
    data: &[u8],
) -> Result<(), FrameError> {
    let too_large = FrameError::TooLarge { stream, data_bytes: data.len() };
    if data.len() > MAX_DATA_BYTES {
        return Err(too_large);
    }
    let data_bytes = u32::try_from(data.len()).map_err(|_| too_large)?;
    out.reserve(HEADER_BYTES + data.len());
    out.extend_from_slice(&FrameHeader { data_bytes, stream, kind, flags }.encode());
    out.extend_from_slice(data);
    Ok(())
}

/// Room that a read into the decoder gets at least.
const MIN_SPACE_BYTES: usize = 64 << 10;

/// Size of the buffer unless a frame needs more: what a socket holds at most in a stream of large frames, so that the buffer
/// is seldom moved. Its memory is taken from the system as it is touched; small frames touch its first page.
const BUFFER_BYTES: usize = 256 << 10;

/// Splits what has been received into frames.
///
/// Read into [`FrameDecoder::space`] and tell with [`FrameDecoder::filled`] how much came, or copy with
/// [`FrameDecoder::extend`]; then take frames with [`FrameDecoder::next_frame`] until there is none. Memory is bounded by
/// one largest frame and what was fed in one go, and grows with what has come, not with what a header announces.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    skip: usize,
}

/// One whole frame, borrowed from the decoder.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: FrameHeader,
    /// Its data, `header.data_bytes` long.
    pub data: &'a [u8],
}

impl FrameDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Free room behind what is held, never empty; for a read.
    pub fn space(&mut self) -> &mut [u8] {
        self.make_space(MIN_SPACE_BYTES);
        &mut self.buffer[self.end..]
    }

    /// Says that the first `bytes` of [`FrameDecoder::space`] have been written.
    ///
    /// # Panics
    /// When `bytes` is more than the space.
    pub fn filled(&mut self, bytes: usize) {
        assert!(bytes <= self.buffer.len() - self.end, "more bytes than there was space");
        self.end += bytes;
    }

    /// Adds received bytes.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.make_space(bytes.len());
        self.buffer[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    /// Bytes that are held and not yet handed out as frames.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.end - self.start
    }

    /// The next whole frame, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] once, as soon as the header is there. The data of such a frame is thrown away as it
    /// comes and the frames behind it follow.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let skipped = self.skip.min(self.pending_bytes());
        self.skip -= skipped;
        self.start += skipped;
        let held = &self.buffer[self.start..self.end];
        let Some(head) = held.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = FrameHeader::decode(head);
        let data_bytes = header.data_bytes as usize;
        if data_bytes > MAX_DATA_BYTES {
            self.start += HEADER_BYTES;
            self.skip = data_bytes;
            return Err(FrameError::TooLarge { stream: header.stream, data_bytes });
        }
        if held.len() < HEADER_BYTES + data_bytes {
            return Ok(None);
        }
        let from = self.start + HEADER_BYTES;
        self.start = from + data_bytes;
        Ok(Some(Frame { header, data: &self.buffer[from..from + data_bytes] }))
    }

    fn make_space(&mut self, wanted: usize) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.buffer.len() != BUFFER_BYTES {
                self.buffer = vec![0; BUFFER_BYTES];
            }
        }
        if self.buffer.len() - self.end >= wanted {
            return;
        }
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let needed = self.end + wanted;
        if self.buffer.len() < needed {
            self.buffer.resize(needed.max(self.buffer.len() * 2), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    // The protocol text's layout, written out by hand: 3 bytes "abc", stream 5, request.
    const REQUEST_ABC: &[u8] = &[0, 0, 0, 3, 0, 0, 0, 5, 1, 0, b'a', b'b', b'c'];

    fn take(decoder: &mut FrameDecoder) -> Option<(FrameHeader, Vec<u8>)> {
        decoder.next_frame().unwrap().map(|frame| (frame.header, frame.data.to_vec()))
    }

    #[test]
    fn encode_frame_when_small_then_bytes_are_those_of_the_protocol() {
        let mut out = Vec::new();
        encode_frame(&mut out, StreamId(5), FrameKind::Request, 0, b"abc").unwrap();
        assert_eq!(out, REQUEST_ABC);
    }

    #[test]
    fn next_frame_when_fed_byte_by_byte_then_comes_once_whole() {
        let mut decoder = FrameDecoder::new();
        for byte in &REQUEST_ABC[..REQUEST_ABC.len() - 1] {
            decoder.extend(&[*byte]);
            assert_eq!(decoder.next_frame(), Ok(None));
        }
        decoder.extend(b"c");
        let (header, data) = take(&mut decoder).unwrap();
        assert_eq!((header.stream, header.kind, &data[..]), (StreamId(5), FrameKind::Request, &b"abc"[..]));
        assert_eq!(take(&mut decoder), None);
    }

    #[test]
    fn next_frame_when_several_arrive_at_once_then_all_come_in_order() {
        let mut bytes = Vec::new();
        for stream in [1, 3, 5, 7] {
            encode_frame(&mut bytes, StreamId(stream), FrameKind::Response, 0, &vec![7; stream as usize])
                .unwrap();
        }
        let mut decoder = FrameDecoder::new();
        decoder.extend(&bytes);
        let streams: Vec<u32> = std::iter::from_fn(|| take(&mut decoder)).map(|(h, _)| h.stream.0).collect();
        assert_eq!(streams, [1, 3, 5, 7]);
        assert_eq!(decoder.pending_bytes(), 0);
    }

    #[test]
    fn next_frame_when_length_is_over_the_limit_then_refused_skipped_and_the_next_comes_whole() {
        let too_large = MAX_DATA_BYTES + 1;
        let header = FrameHeader {
            data_bytes: u32::try_from(too_large).unwrap(),
            stream: StreamId(9),
            kind: FrameKind::Response,
            flags: 0,
        };
        let mut decoder = FrameDecoder::new();
        decoder.extend(&header.encode());
        let refused = Err(FrameError::TooLarge { stream: StreamId(9), data_bytes: too_large });
        assert_eq!(decoder.next_frame(), refused);
        let mut most_bytes = 0;
        for _ in 0..too_large / 1000 {
            decoder.extend(&[0xff; 1000]);
            assert_eq!(decoder.next_frame(), Ok(None));
            most_bytes = most_bytes.max(decoder.buffer.len());
        }
        decoder.extend(&vec![0xff; too_large % 1000]);
        decoder.extend(REQUEST_ABC);
        assert_eq!(take(&mut decoder).unwrap().1, b"abc");
        assert!(most_bytes <= BUFFER_BYTES, "{most_bytes} bytes held for a frame that is thrown away");
    }

    #[test]
    fn next_frame_when_a_large_frame_came_through_space_then_memory_is_given_back() {
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, StreamId(1), FrameKind::Response, 0, &vec![3; MAX_DATA_BYTES]).unwrap();
        let mut decoder = FrameDecoder::new();
        let mut fed = 0;
        while fed < bytes.len() {
            let space = decoder.space();
            let step = space.len().min(bytes.len() - fed);
            space[..step].copy_from_slice(&bytes[fed..fed + step]);
            decoder.filled(step);
            fed += step;
            assert!(decoder.buffer.len() <= 2 * fed + BUFFER_BYTES);
        }
        assert_eq!(take(&mut decoder).unwrap().1.len(), MAX_DATA_BYTES);
        decoder.space();
        assert!(decoder.buffer.len() <= BUFFER_BYTES);
    }

    #[test]
    fn encode_frame_when_data_is_one_byte_over_the_limit_then_refused_and_out_unchanged() {
        let mut out = vec![1];
        let data = vec![0; MAX_DATA_BYTES + 1];
        assert!(encode_frame(&mut out, StreamId(1), FrameKind::Data, 0, &data).is_err());
        assert_eq!(out, [1]);
        assert!(encode_frame(&mut out, StreamId(1), FrameKind::Data, 0, &data[1..]).is_ok());
    }

    #[test]
    fn frame_kind_when_unknown_then_number_survives() {
        for number in 0..=u8::MAX {
            assert_eq!(FrameKind::from_wire(number).wire(), number);
        }
    }
}
