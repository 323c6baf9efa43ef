//! JSON documents to wire bytes and back, by the name of the RPC.
//!
//! Names are the protocol's own, bytes are base64 text, enumerations are their value's name (a number is taken too),
//! absent fields have their defaults, unknown fields are refused so that typing errors are found. On the wire unknown
//! fields are ignored, as proto3 wants it.

use prost::Message;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Why a document could not be turned into a message, or a message into a document.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProtoError {
    /// There is no such RPC.
    #[error("no RPC {service}/{method}")]
    UnknownRpc {
        /// Service asked for.
        service: String,
        /// Method asked for.
        method: String,
    },
    /// The document does not fit the message.
    #[error("{method}: document does not fit at line {line}, column {column}")]
    Document {
        /// Method of the request.
        method: String,
        /// Line of the fault, from 1.
        line: usize,
        /// Column of the fault, from 1.
        column: usize,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// The bytes are no message of that type.
    #[error("{method}: answer is no valid message")]
    Wire {
        /// Method of the request.
        method: String,
        /// What the decoder says.
        #[source]
        source: prost::DecodeError,
    },
}

fn encode<T: Message + Default + DeserializeOwned>(method: &str, json: &[u8]) -> Result<Vec<u8>, ProtoError> {
    // An absent document stands for a request with no field set.
    let message = if json.is_empty() { Ok(T::default()) } else { serde_json::from_slice::<T>(json) };
    message.map(|message| message.encode_to_vec()).map_err(|source| ProtoError::Document {
        method: method.to_owned(),
        line: source.line(),
        column: source.column(),
        source,
    })
}

fn decode<T: Message + Default + Serialize>(method: &str, wire: &[u8]) -> Result<Vec<u8>, ProtoError> {
    let message = T::decode(wire).map_err(|source| ProtoError::Wire { method: method.to_owned(), source })?;
    serde_json::to_vec(&message).map_err(|source| ProtoError::Document {
        method: method.to_owned(),
        line: 0,
        column: 0,
        source,
    })
}

macro_rules! converters {
    ($(($service:literal, $method:literal, $request:ty, $answer:ty),)*) => {
        /// Wire bytes of the request of `service`/`method` given as a JSON document (empty: no field set).
        ///
        /// # Errors
        /// `UnknownRpc`; `Document` with the place of the fault.
        pub fn json_to_wire(service: &str, method: &str, json: &[u8]) -> Result<Vec<u8>, ProtoError> {
            match (service, method) {
                $(($service, $method) => encode::<$request>(method, json),)*
                _ => Err(ProtoError::UnknownRpc { service: service.to_owned(), method: method.to_owned() }),
            }
        }

        /// JSON document of the answer of `service`/`method`.
        ///
        /// # Errors
        /// `UnknownRpc`; `Wire` when the bytes are no such message.
        pub fn wire_to_json(service: &str, method: &str, wire: &[u8]) -> Result<Vec<u8>, ProtoError> {
            match (service, method) {
                $(($service, $method) => decode::<$answer>(method, wire),)*
                _ => Err(ProtoError::UnknownRpc { service: service.to_owned(), method: method.to_owned() }),
            }
        }
    };
}
for_each_rpc!(converters);

/// Bytes as base64 text (standard alphabet, padded).
pub(crate) mod base64_text {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map_err(serde::de::Error::custom)
    }
}

/// A generated enumeration, with the names of its values.
pub(crate) trait NamedEnum: TryFrom<i32> + Into<i32> + Sized {
    fn name(&self) -> &'static str;
    fn from_name(name: &str) -> Option<Self>;
}

macro_rules! named_enums {
    ($($name:ty),* $(,)?) => {$(
        impl NamedEnum for $name {
            fn name(&self) -> &'static str {
                self.as_str_name()
            }
            fn from_name(name: &str) -> Option<Self> {
                Self::from_str_name(name)
            }
        }
    )*};
}
named_enums!(
    crate::types::IpFamily,
    crate::types::FsGroupChangePolicy,
    crate::grpc::volume_usage::Unit,
    crate::grpc::health_check_response::ServingStatus,
);

/// A known value by its name, a value of a newer protocol by its number.
pub(crate) fn serialize_enum<E: NamedEnum, S: Serializer>(
    number: &i32,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match E::try_from(*number) {
        Ok(value) => serializer.serialize_str(value.name()),
        Err(_) => serializer.serialize_i32(*number),
    }
}

pub(crate) fn deserialize_enum<'de, E: NamedEnum, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<i32, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum NameOrNumber<'a> {
        Number(i32),
        Name(std::borrow::Cow<'a, str>),
    }
    match NameOrNumber::deserialize(deserializer)? {
        NameOrNumber::Number(number) => Ok(number),
        NameOrNumber::Name(name) => E::from_name(&name)
            .map(Into::into)
            .ok_or_else(|| D::Error::custom(format_args!("unknown value `{name}` of an enumeration"))),
    }
}
