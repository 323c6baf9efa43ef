//! The ttrpc envelope: what request and response frames carry.
//!
//! Source: containerd/ttrpc `request.proto`, `google/rpc/status.proto`, gRPC status codes.

use std::fmt;

use prost::encoding::{decode_varint, encode_varint};

/// Status codes; the numbers are gRPC's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
#[non_exhaustive]
pub enum Code {
    /// Success.
    Ok = 0,
    /// The caller gave up.
    Cancelled = 1,
    /// No better code fits.
    Unknown = 2,
    /// The request makes no sense.
    InvalidArgument = 3,
    /// Time ran out.
    DeadlineExceeded = 4,
    /// What was named does not exist.
    NotFound = 5,
    /// The name is taken.
    AlreadyExists = 6,
    /// Not allowed.
    PermissionDenied = 7,
    /// A limit was reached.
    ResourceExhausted = 8,
    /// Not in this state.
    FailedPrecondition = 9,
    /// A conflict.
    Aborted = 10,
    /// Past the end.
    OutOfRange = 11,
    /// No such method.
    Unimplemented = 12,
    /// A defect of the server.
    Internal = 13,
    /// Try again later.
    Unavailable = 14,
    /// Data is lost.
    DataLoss = 15,
    /// Who are you.
    Unauthenticated = 16,
}

/// A key and a value beside a request, for instance a trace context.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeyValue {
    /// The key; may come several times.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// The data of a request frame.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Request {
    /// Full name of the service (`grpc.AgentService`).
    #[prost(string, tag = "1")]
    pub service: String,
    /// Name of the method.
    #[prost(string, tag = "2")]
    pub method: String,
    /// The request message, encoded.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// Time that is left for the call; 0: no limit.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
    /// Context of the call.
    #[prost(message, repeated, tag = "5")]
    pub metadata: Vec<KeyValue>,
}

/// A message of any type, as a detail of a status.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Any {
    /// Its type.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message, encoded.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// How a call ended.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Status {
    /// A [`Code`]; numbers that this version does not know are kept.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// What happened.
    #[prost(string, tag = "2")]
    pub message: String,
    /// More about it.
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<Any>,
}

impl Status {
    /// A status with this code and text.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code: code as i32, message: message.into(), details: Vec::new() }
    }

    /// The answer to a service that is not served; the text is the one that Kata's runtimes know.
    #[must_use]
    pub fn unknown_service(service: &str) -> Self {
        Self::new(Code::InvalidArgument, format!("{service} service does not exist"))
    }

    /// The answer to a method that is not served; Kata's runtimes go on after it for some methods.
    #[must_use]
    pub fn unknown_method(method: &str) -> Self {
        Self::new(Code::Unimplemented, format!("{method} method"))
    }

    /// Whether it says success.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.code == Code::Ok as i32
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Code::try_from(self.code) {
            Ok(code) => write!(f, "{code:?}: {}", self.message),
            Err(_) => write!(f, "code {}: {}", self.code, self.message),
        }
    }
}

/// The data of a response frame.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Response {
    /// Absent or with code 0: success.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The response message, encoded.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// What stands before the payload in a successful [`Response`]: tag and length. Empty for an empty payload.
///
/// With it a response is sent without copying its payload into a second buffer.
pub(crate) fn response_prefix(payload_bytes: usize) -> Vec<u8> {
    let mut prefix = Vec::new();
    if payload_bytes > 0 {
        prefix.push(PAYLOAD_TAG);
        encode_varint(payload_bytes as u64, &mut prefix);
    }
    prefix
}

/// The payload of an encoded [`Response`] that has nothing but it, as those of successful calls are; `None` for any other.
pub(crate) fn sole_payload(data: &[u8]) -> Option<&[u8]> {
    let (&tag, mut rest) = data.split_first()?;
    let length = decode_varint(&mut rest).ok()?;
    (tag == PAYLOAD_TAG && length == rest.len() as u64).then_some(rest)
}

/// Field 2, length-delimited.
const PAYLOAD_TAG: u8 = (2 << 3) | 2;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use prost::Message;

    use super::*;

    #[test]
    fn request_when_encoded_then_bytes_are_those_of_the_protocol() {
        let request = Request {
            service: "s".into(),
            method: "m".into(),
            payload: b"p".to_vec(),
            timeout_nano: 300,
            metadata: vec![KeyValue { key: "k".into(), value: "v".into() }],
        };
        let golden = b"\x0a\x01s\x12\x01m\x1a\x01p\x20\xac\x02\x2a\x06\x0a\x01k\x12\x01v";
        assert_eq!(request.encode_to_vec(), golden);
        assert_eq!(Request::decode(&golden[..]).unwrap(), request);
    }

    #[test]
    fn response_when_encoded_then_bytes_are_those_of_the_protocol() {
        let mut status = Status::new(Code::NotFound, "no");
        status.details.push(Any { type_url: "t".into(), value: vec![9] });
        let response = Response { status: Some(status), payload: Vec::new() };
        let golden = b"\x0a\x0e\x08\x05\x12\x02no\x1a\x06\x0a\x01t\x12\x01\x09";
        assert_eq!(response.encode_to_vec(), golden);
        assert_eq!(Response::decode(&golden[..]).unwrap(), response);
    }

    #[test]
    fn response_prefix_when_put_before_the_payload_then_equals_the_encoded_response() {
        for size in [0, 1, 127, 128, 70_000] {
            let payload = vec![7; size];
            let mut bytes = response_prefix(size);
            bytes.extend_from_slice(&payload);
            assert_eq!(bytes, Response { status: None, payload }.encode_to_vec());
        }
    }

    #[test]
    fn sole_payload_when_there_is_just_that_then_it_else_none() {
        for size in [1, 127, 128, 70_000] {
            let payload = vec![7; size];
            let data = Response { status: None, payload: payload.clone() }.encode_to_vec();
            assert_eq!(sole_payload(&data), Some(&payload[..]));
            // Cut short, and with something behind it.
            assert_eq!(sole_payload(&data[..data.len() - 1]), None);
            assert_eq!(sole_payload(&[&data[..], &[0x18, 1]].concat()), None);
        }
        let status = Response { status: Some(Status::new(Code::Ok, "")), payload: vec![1] }.encode_to_vec();
        for other in [&b""[..], b"\x12", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", &status] {
            assert_eq!(sole_payload(other), None, "{other:?}");
        }
    }

    #[test]
    fn code_when_taken_as_a_number_then_it_is_grpcs() {
        let numbers: Vec<i32> = (0..=17).filter(|n| Code::try_from(*n).is_ok()).collect();
        assert_eq!(numbers, (0..=16).collect::<Vec<_>>());
        let named = [
            (Code::Ok, 0),
            (Code::Cancelled, 1),
            (Code::Unknown, 2),
            (Code::InvalidArgument, 3),
            (Code::DeadlineExceeded, 4),
            (Code::NotFound, 5),
            (Code::AlreadyExists, 6),
            (Code::PermissionDenied, 7),
            (Code::ResourceExhausted, 8),
            (Code::FailedPrecondition, 9),
            (Code::Aborted, 10),
            (Code::OutOfRange, 11),
            (Code::Unimplemented, 12),
            (Code::Internal, 13),
            (Code::Unavailable, 14),
            (Code::DataLoss, 15),
            (Code::Unauthenticated, 16),
        ];
        assert!(named.iter().all(|(code, number)| *code as i32 == *number));
    }

    #[test]
    fn status_when_service_or_method_is_unknown_then_text_and_code_are_those_that_runtimes_match() {
        let service = Status::unknown_service("grpc.Nope");
        assert_eq!(
            (service.code, service.message.as_str()),
            (Code::InvalidArgument as i32, "grpc.Nope service does not exist")
        );
        let method = Status::unknown_method("Nope");
        assert_eq!((method.code, method.message.as_str()), (Code::Unimplemented as i32, "Nope method"));
    }
}
