//! What is asked of a keeper: one JSON document a line, answered by one line; descriptors travel beside the line.
//!
//! Byte strings of the host (arguments, paths) are JSON strings with one character a byte, so that any of them gets through.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::ShimError;

/// Longest line, of a request or of an answer.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// Bounds of what a keeper holds on disk.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one log file of a container; there are at most two.
    pub log_bytes: u64,
    /// Bytes of the keeper's own log file; there are at most two.
    pub own_log_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { log_bytes: 8 << 20, own_log_bytes: 256 << 10 }
    }
}

/// A string of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub OsString);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes =
            text.chars().map(|letter| u8::try_from(u32::from(letter))).collect::<Result<Vec<u8>, _>>();
        let bytes = bytes.map_err(|_| serde::de::Error::custom("a character above 255 is no byte"))?;
        Ok(Self(OsString::from_vec(bytes)))
    }
}

/// The vsock device that the keeper serves.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockRequest {
    /// Where programs of the host reach the guest.
    pub path: Bytes,
    /// The guest's context id.
    pub cid: u32,
}

/// Start the VMM. Descriptors: those of `fds` in their order, then the console if there is one, then the vsock device's.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpawnMessage {
    /// Program and arguments.
    pub argv: Vec<Bytes>,
    /// The whole environment.
    pub env: Vec<(Bytes, Bytes)>,
    /// Working directory.
    pub cwd: Option<Bytes>,
    /// Numbers in the child.
    pub fds: Vec<i32>,
    /// Whether a console comes along.
    #[serde(default)]
    pub console: bool,
    /// The device, unless the host's kernel has one.
    pub vsock: Option<VsockRequest>,
}

/// Keep the output and the end of a container that the agent has made.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepMessage {
    /// The container.
    pub container: String,
    /// Whether it has a terminal: then there is no stderr.
    #[serde(default)]
    pub terminal: bool,
    /// The agent's address.
    pub agent: AgentAddress,
}

/// Where the agent listens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentAddress {
    /// The hybrid socket.
    Hybrid(Bytes),
    /// A context id of the host's kernel.
    Vsock(u32),
}

/// What is used by one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Turn {
    /// The VMM's control connection.
    Qmp,
    /// The state document.
    State,
}

/// What is asked.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Start the VMM; of the creator only.
    Spawn(SpawnMessage),
    /// From now on the sandbox does not depend on its creator. Descriptor: its lock.
    Commit,
    /// Keep a container's output and end.
    Keep(KeepMessage),
    /// A container was removed: drop its log and its exit record.
    Forget {
        /// The container.
        container: String,
    },
    /// Answer when the log has moved on from this position, or nothing more comes.
    Follow {
        /// The container.
        container: String,
        /// Inode of the file that was read.
        file: u64,
        /// Bytes of it that were read.
        offset: u64,
    },
    /// Answer when it is this connection's turn at something that one may use at a time; it ends with the connection.
    Turn {
        /// At what.
        at: Turn,
    },
    /// How the keeper, the VMM and the containers are.
    Status,
    /// The VMM's stderr and console.
    Tails,
    /// End the VMM at once, then the keeper.
    End,
}

impl Request {
    /// How many descriptors come with it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Spawn(spawn) => {
                spawn.fds.len() + usize::from(spawn.console) + usize::from(spawn.vsock.is_some())
            }
            Self::Commit => 1,
            _ => 0,
        }
    }
}

/// Read a line.
pub fn parse(line: &[u8]) -> Result<Request, ShimError> {
    serde_json::from_slice(line)
        .map_err(|error| ShimError::invalid(format!("the request makes no sense: {error}")))
}

/// The line of an answer.
pub fn answer(result: &Result<serde_json::Value, ShimError>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Failure<'a> {
        kind: &'a str,
        text: String,
        errno: Option<i32>,
    }
    let document = match result {
        Ok(value) => serde_json::json!({ "ok": value }),
        Err(error) => {
            let failure = Failure { kind: error.kind(), text: error.to_string(), errno: error.errno() };
            serde_json::json!({ "error": failure })
        }
    };
    let mut line = document.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Whether a name can be a container's and a part of a file name.
pub fn check_container(name: &str) -> Result<(), ShimError> {
    let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if (1..=128).contains(&name.len())
        && name.bytes().all(is_fine)
        && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
    {
        return Ok(());
    }
    Err(ShimError::invalid(format!("{name:?} is no container's name")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn parse_when_a_spawn_comes_then_bytes_and_descriptors_are_as_sent() {
        let line = br#"{"op":"spawn","argv":["qemu","\u00ff"],"env":[["A","b"]],"cwd":null,"fds":[3,4],
            "console":true,"vsock":{"path":"/x","cid":3}}"#;
        let request = parse(line).unwrap();
        assert_eq!(request.descriptors(), 4);
        let Request::Spawn(spawn) = request else { panic!("{request:?}") };
        assert_eq!(spawn.argv[1].0.clone().into_vec(), [0xff]);
    }

    #[test]
    fn parse_when_it_is_no_request_then_the_error_says_what_is_wrong() {
        for line in [&b"{"[..], b"[]", br#"{"op":"dance"}"#, br#"{"op":"spawn","argv":["\u0100"]}"#] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), "invalid");
            let text = String::from_utf8(answer(&Err(error))).unwrap();
            assert!(text.starts_with(r#"{"error":{"#) && text.ends_with('\n'), "{text}");
        }
    }

    #[test]
    fn check_container_when_the_name_could_leave_the_directory_then_refused() {
        for name in ["", "-", "..", "../x", "a/b", ".hidden", "a\nb", &"x".repeat(129)] {
            assert!(check_container(name).is_err(), "{name:?}");
        }
        assert!(check_container("web-1.log_x").is_ok());
    }
}
