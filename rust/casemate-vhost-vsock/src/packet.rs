//! The header of a vsock packet. No I/O.
//!
//! Source: VIRTIO 1.2, section 5.10.6 «Device Operation», `struct virtio_vsock_hdr`.

/// Bytes in a header.
pub const HEADER_BYTES: usize = 44;

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// Connection-oriented byte stream, the only socket type served.
pub const TYPE_STREAM: u16 = 1;

/// In [`Header::flags`] of [`Op::Shutdown`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;

/// In [`Header::flags`] of [`Op::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// Both directions at once.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for. Numbers not listed are kept, so that they can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// 1: connect.
    Request,
    /// 2: connected.
    Response,
    /// 3: refused, or gone.
    Reset,
    /// 4: one or both directions end.
    Shutdown,
    /// 5: data.
    Data,
    /// 6: how much the sender can take.
    CreditUpdate,
    /// 7: asks for a credit update.
    CreditRequest,
    /// A number that the specification does not have.
    Unknown(u16),
}

impl Op {
    /// The number on the wire.
    #[must_use]
    pub fn wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(number) => number,
        }
    }

    /// The operation for a number on the wire.
    #[must_use]
    pub fn from_wire(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

/// A decoded header. Every bit pattern decodes; what a field may hold is judged by who reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub data_bytes: u32,
    /// Socket type, [`TYPE_STREAM`] or something not served.
    pub socket_type: u16,
    /// What is asked for.
    pub op: Op,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// Size of the sender's receive window.
    pub buf_alloc: u32,
    /// Bytes that the sender's application has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decode the little-endian form.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        let mut take = |size: usize| {
            let (field, tail) = rest.split_at(size);
            rest = tail;
            field.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            data_bytes: take(4) as u32,
            socket_type: take(2) as u16,
            op: Op::from_wire(take(2) as u16),
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    /// Encode to the little-endian form.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.data_bytes.to_le_bytes());
        put(&self.socket_type.to_le_bytes());
        put(&self.op.wire().to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The RST that answers this packet, addressed as its sender expects.
    #[must_use]
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            data_bytes: 0,
            socket_type: self.socket_type,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // The specification's layout, written out by hand.
    const REQUEST: [u8; HEADER_BYTES] = [
        3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0xd2, 4, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0,
        0, 0, 0, 0, 0, 4, 0, 7, 0, 0, 0,
    ];

    #[test]
    fn test_decode_when_bytes_are_those_of_the_specification_then_every_field_is_right() {
        let header = Header::decode(&REQUEST);
        assert_eq!((header.src_cid, header.dst_cid), (3, HOST_CID));
        assert_eq!((header.src_port, header.dst_port), (1234, 1024));
        assert_eq!((header.data_bytes, header.socket_type, header.op), (0, TYPE_STREAM, Op::Request));
        assert_eq!((header.flags, header.buf_alloc, header.fwd_cnt), (0, 256 << 10, 7));
        assert_eq!(header.encode(), REQUEST);
    }

    #[test]
    fn test_reset_reply_when_made_then_addresses_are_swapped() {
        let reply = Header::decode(&REQUEST).reset_reply();
        assert_eq!((reply.src_cid, reply.src_port), (HOST_CID, 1024));
        assert_eq!((reply.dst_cid, reply.dst_port), (3, 1234));
        assert_eq!(reply.op, Op::Reset);
    }

    proptest! {
        #[test]
        fn test_decode_when_any_bytes_then_encode_gives_them_back(bytes in any::<[u8; HEADER_BYTES]>()) {
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }
}
