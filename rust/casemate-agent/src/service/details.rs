//! What the agent says about the guest and itself.

use std::fs;
use std::path::Path;

use casemate_proto::grpc;

use crate::error::{AgentError, Result};
use crate::{marks, storage};

/// Life-cycle requests of one connection are worked off in the order they came.
const ORDERED: &str = "casemate.ordered";
/// Block devices can be named by their serial: `serial=<text>`.
const BLOCK_BY_SERIAL: &str = "casemate.block_serial";
/// `casemate.Diagnostics/Echo` is served.
const ECHO: &str = "casemate.echo";
/// The service `casemate.DeviceService` is there.
const AWAIT_DEVICE: &str = "casemate.await_device";
/// `User.Username` (`name[:group]`) is looked up in the container.
const USERNAME: &str = "casemate.username";

/// GetGuestDetails.
pub fn guest_details(
    request: &grpc::GuestDetailsRequest,
    is_init: bool,
) -> Result<grpc::GuestDetailsResponse> {
    let memory = Path::new("/sys/devices/system/memory");
    let block_size = if request.mem_block_size { memory_block_size(memory)? } else { 0 };
    let mut features: Vec<String> =
        [AWAIT_DEVICE, BLOCK_BY_SERIAL, ECHO, ORDERED, USERNAME].map(str::to_owned).into();
    features.extend(marks::features());
    features.sort_unstable();
    Ok(grpc::GuestDetailsResponse {
        mem_block_size_bytes: block_size,
        agent_details: Some(grpc::AgentDetails {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            init_daemon: is_init,
            device_handlers: Vec::new(),
            storage_handlers: storage::DRIVERS.map(str::to_owned).into(),
            supports_seccomp: false,
            extra_features: features,
        }),
        support_mem_hotplug_probe: request.mem_hotplug_probe && memory.join("probe").exists(),
    })
}

/// Bytes of a memory block, 0 where memory can't be plugged.
fn memory_block_size(memory: &Path) -> Result<u64> {
    let path = memory.join("block_size_bytes");
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(AgentError::io("read", path.to_string_lossy(), &error)),
        Ok(text) => u64::from_str_radix(text.trim(), 16)
            .map_err(|_| AgentError::invalid("mem_block_size", format!("the kernel says `{}`", text.trim()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_memory_block_size_when_file_is_there_missing_or_empty_then_as_specified() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(memory_block_size(directory.path()).expect("absent"), 0);
        fs::write(directory.path().join("block_size_bytes"), "8000000\n").expect("written");
        assert_eq!(memory_block_size(directory.path()).expect("there"), 128 << 20);
        fs::write(directory.path().join("block_size_bytes"), "").expect("written");
        assert!(memory_block_size(directory.path()).is_err());
    }

    #[test]
    fn test_guest_details_when_asked_then_extensions_are_announced() {
        let details = guest_details(&grpc::GuestDetailsRequest::default(), true).expect("answers");
        let agent = details.agent_details.expect("has details");
        assert!(agent.extra_features.iter().any(|feature| feature == "casemate.ordered"));
        assert!(agent.extra_features.is_sorted() && agent.init_daemon && !agent.supports_seccomp);
    }
}
