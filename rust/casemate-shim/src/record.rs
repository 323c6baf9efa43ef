//! What is left on disk when something has ended.

use serde::Serialize;

/// Form of both documents.
pub const VERSION: u32 = 1;

/// Most bytes of the VMM's stderr and of its console that a record holds, each.
pub const TAIL_BYTES: usize = 16 << 10;

/// Why a container counts as ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExitCause {
    /// Its first process ended.
    Exited,
    /// The VMM ended first.
    VmmEnded,
    /// The agent does not know it any more.
    Unknown,
}

/// The end of a container.
#[derive(Clone, Debug, Serialize)]
pub struct ExitRecord {
    /// Form of the document.
    pub version: u32,
    /// The container.
    pub container_id: String,
    /// Exit status, 128 + n for signal n; none when it did not end by itself.
    pub status: Option<i32>,
    /// Why it counts as ended.
    pub cause: ExitCause,
    /// The cause in words.
    pub text: String,
    /// When the keeper learnt of it.
    pub ended_unix_ns: u64,
    /// Bytes of output that are in the log or were.
    pub logged_bytes: u64,
    /// Bytes of output that could not be written.
    pub lost_bytes: u64,
    /// Why they could not.
    pub log_error: Option<String>,
}

/// The end of the VMM.
#[derive(Clone, Debug, Serialize)]
pub struct EndRecord {
    /// Form of the document.
    pub version: u32,
    /// Its process id.
    pub vmm_pid: i32,
    /// Exit status, negative for a signal.
    pub status: i32,
    /// Whether it was asked of the keeper.
    pub wanted: bool,
    /// When the keeper learnt of it.
    pub ended_unix_ns: u64,
    /// The last of what it wrote on stderr.
    pub stderr_tail: String,
    /// The last of what the guest wrote on its console.
    pub console_tail: String,
    /// What the keeper could not do, one sentence each.
    pub problems: Vec<String>,
}

/// The last [`TAIL_BYTES`] as text.
pub fn tail_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]).into_owned()
}
