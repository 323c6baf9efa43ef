//! Whether a device that was plugged in can be used, and whether one that was taken away is gone.

use std::fs;
use std::path::Path;
use std::time::Duration;

use casemate_proto::casemate::{AwaitDeviceRequest, AwaitDeviceResponse};

use crate::device::block::{answers, virtio_child_of};
use crate::device::pci::PciPath;
use crate::device::uevent::DeviceEvents;
use crate::error::{AgentError, Context, Result};

/// What a device is to its users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subsystem {
    Block,
    Net,
}

impl Subsystem {
    fn parse(text: &str) -> Result<Self> {
        match text {
            "block" => Ok(Self::Block),
            "net" => Ok(Self::Net),
            other => Err(AgentError::invalid("subsystem", format!("`{other}` is neither `block` nor `net`"))),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Net => "net",
        }
    }
}

/// AwaitDevice, on the guest's own sysfs and devices.
///
/// # Errors
/// A field that makes no sense; `TimedOut`, which says how far the device came.
pub fn await_device(events: &DeviceEvents, request: &AwaitDeviceRequest) -> Result<AwaitDeviceResponse> {
    await_below(Path::new("/sys"), Path::new("/dev"), events, request)
}

fn await_below(
    sys: &Path,
    dev: &Path,
    events: &DeviceEvents,
    request: &AwaitDeviceRequest,
) -> Result<AwaitDeviceResponse> {
    let subsystem = Subsystem::parse(&request.subsystem)?;
    let path = PciPath::parse(&request.pci_path)?;
    let at_most = Duration::from_millis(request.timeout_ms.into());
    let what = format!("{} device at {}", subsystem.name(), request.pci_path);
    if request.gone {
        return events.wait_for_end(&format!("the end of the {what}"), at_most, || {
            Ok(path.resolve(sys)?.is_none().then(AwaitDeviceResponse::default))
        });
    }
    let found = events.wait_for(&what, at_most, || find(sys, dev, &path, subsystem));
    found.map_err(|error| match error {
        AgentError::TimedOut { what, after_ms } => {
            let is_there = matches!(path.resolve(sys), Ok(Some(_)));
            let stage = if is_there { "no driver made it usable" } else { "nothing is at that address" };
            AgentError::TimedOut { what: format!("{what}: {stage}"), after_ms }
        }
        other => other,
    })
}

fn find(sys: &Path, dev: &Path, path: &PciPath, subsystem: Subsystem) -> Result<Option<AwaitDeviceResponse>> {
    let Some(device) = path.resolve(sys)? else { return Ok(None) };
    let Some(name) = virtio_child_of(&device, subsystem.name()) else { return Ok(None) };
    let hardware_address = match subsystem {
        Subsystem::Block => {
            let node = dev.join(&name);
            if !(node.exists() && answers(&node)) {
                return Ok(None);
            }
            String::new()
        }
        Subsystem::Net => {
            let file = sys.join("class/net").join(&name).join("address");
            // The kernel makes the directory a moment before the interface is registered.
            match fs::read_to_string(&file) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                other => other.context("read", file.to_string_lossy())?.trim_end().to_owned(),
            }
        }
    };
    Ok(Some(AwaitDeviceResponse { name, hardware_address }))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Guest(tempfile::TempDir);

    impl Guest {
        fn new() -> Self {
            let guest = Self(tempfile::tempdir().expect("a directory"));
            for directory in ["sys/devices/pci0000:00/0000:00:0f.3/pci_bus/0000:04", "dev"] {
                guest.make(directory);
            }
            guest
        }

        fn make(&self, directory: &str) {
            fs::create_dir_all(self.0.path().join(directory)).expect("made");
        }

        fn write(&self, file: &str, text: &str) {
            fs::write(self.0.path().join(file), text).expect("written");
        }

        fn ask(&self, subsystem: &str, gone: bool) -> Result<AwaitDeviceResponse> {
            let request = AwaitDeviceRequest {
                subsystem: subsystem.into(),
                pci_path: "0f.3/00".into(),
                gone,
                timeout_ms: 1,
            };
            let root = self.0.path();
            await_below(&root.join("sys"), &root.join("dev"), &DeviceEvents::default(), &request)
        }
    }

    const DEVICE: &str = "sys/devices/pci0000:00/0000:00:0f.3/0000:04:00.0";

    #[test]
    fn test_await_device_when_disk_answers_then_its_name() {
        let guest = Guest::new();
        guest.make(&format!("{DEVICE}/virtio1/block/vdb"));
        assert!(guest.ask("block", false).is_err(), "there is no node yet");
        guest.write("dev/vdb", "");
        assert_eq!(guest.ask("block", false).expect("is there").name, "vdb");
    }

    #[test]
    fn test_await_device_when_interface_is_registered_then_its_name_and_address() {
        let guest = Guest::new();
        guest.make(&format!("{DEVICE}/virtio1/net/eth0"));
        assert!(guest.ask("net", false).is_err(), "it is not registered yet");
        guest.make("sys/class/net/eth0");
        guest.write("sys/class/net/eth0/address", "02:00:00:00:00:01\n");
        let answer = guest.ask("net", false).expect("is there");
        assert_eq!((answer.name.as_str(), answer.hardware_address.as_str()), ("eth0", "02:00:00:00:00:01"));
    }

    #[test]
    fn test_await_device_when_late_then_error_says_how_far_it_came() {
        let guest = Guest::new();
        let error = guest.ask("net", false).expect_err("absent").to_string();
        assert!(error.contains("net device at 0f.3/00: nothing is at that address"), "{error}");
        guest.make(DEVICE);
        let error = guest.ask("net", false).expect_err("no driver").to_string();
        assert!(error.contains("no driver made it usable"), "{error}");
    }

    #[test]
    fn test_await_device_when_gone_is_asked_then_answers_for_an_empty_slot_only() {
        let guest = Guest::new();
        assert_eq!(guest.ask("block", true).expect("is gone"), AwaitDeviceResponse::default());
        guest.make(DEVICE);
        let error = guest.ask("block", true).expect_err("is there").to_string();
        assert!(error.contains("the end of the block device at 0f.3/00"), "{error}");
    }

    #[test]
    fn test_await_device_when_request_makes_no_sense_then_refused() {
        let guest = Guest::new();
        assert!(guest.ask("tty", false).expect_err("refused").to_string().contains("neither"));
        let events = DeviceEvents::default();
        let request = AwaitDeviceRequest { subsystem: "net".into(), ..Default::default() };
        assert!(await_device(&events, &request).is_err());
    }
}
