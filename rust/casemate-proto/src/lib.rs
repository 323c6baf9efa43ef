//! Messages of the guest agent's protocol, generated from `proto/*.proto` by `cargo run -p xtask -- proto`.
//!
//! With the feature `json` the messages have serde derives that use the protocol's own field names, and [`json`] turns
//! documents into wire bytes and back. This crate does no I/O and knows no framing (that is `casemate-ttrpc`).

/// Requests, answers and the OCI specification.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod grpc {
    include!("generated/grpc.rs");
}

/// Requests beyond the agent protocol.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod casemate {
    include!("generated/casemate.rs");
}

/// Network and storage value types.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod types {
    include!("generated/types.rs");
}

include!("generated/rpcs.rs");

#[cfg(feature = "json")]
pub mod json;
#[cfg(feature = "json")]
pub use json::{json_to_wire, wire_to_json};

/// Version of the API, as Health.Version reports it.
pub const API_VERSION: &str = "0.0.1";

/// Names of the services.
pub const AGENT_SERVICE: &str = "grpc.AgentService";
/// Name of the health service.
pub const HEALTH_SERVICE: &str = "grpc.Health";

/// Name of the service for requests about devices.
pub const DEVICE_SERVICE: &str = "casemate.DeviceService";

macro_rules! list {
    ($(($service:literal, $method:literal, $request:ty, $answer:ty),)*) => {
        /// Every RPC as (service, method).
        pub const RPCS: &[(&str, &str)] = &[$(($service, $method)),*];
    };
}
for_each_rpc!(list);

#[cfg(test)]
mod tests;
