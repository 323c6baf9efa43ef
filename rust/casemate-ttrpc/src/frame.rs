//! The ttrpc frame: a ten-byte header and its data. No I/O, no allocation beyond the buffer.
//!
//! Source: containerd/ttrpc `PROTOCOL.md`, sections «Message Frame» and «Message Flags».

use std::fmt;

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

/// Splits what has been received into frames.
///
/// Feed bytes with [`FrameDecoder::extend`], take frames with [`FrameDecoder::next_frame`].
/// Memory is bounded by one largest frame and what was fed in one go.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    start: usize,
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

    /// Adds received bytes.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start > self.buffer.len() / 2 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that are held and not yet handed out as frames.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// The next whole frame, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] as soon as the header is there: nothing is buffered for such a
    /// frame. The connection can't be used further, the same error comes again.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let held = &self.buffer[self.start..];
        let Some(head) = held.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = FrameHeader::decode(head);
        let data_bytes = header.data_bytes as usize;
        if data_bytes > MAX_DATA_BYTES {
            return Err(FrameError::TooLarge { stream: header.stream, data_bytes });
        }
        if held.len() < HEADER_BYTES + data_bytes {
            return Ok(None);
        }
        let from = self.start + HEADER_BYTES;
        self.start = from + data_bytes;
        Ok(Some(Frame { header, data: &self.buffer[from..from + data_bytes] }))
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
    fn next_frame_when_length_is_over_the_limit_then_refused_from_the_header_alone() {
        let header =
            FrameHeader { data_bytes: u32::MAX, stream: StreamId(9), kind: FrameKind::Response, flags: 0 };
        let mut decoder = FrameDecoder::new();
        decoder.extend(&header.encode());
        let refused = Err(FrameError::TooLarge { stream: StreamId(9), data_bytes: u32::MAX as usize });
        assert_eq!(decoder.next_frame(), refused);
        assert_eq!(decoder.next_frame(), refused);
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
