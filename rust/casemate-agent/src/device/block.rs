//! Block devices: from the address in a request to the node in `/dev`.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::device::pci::PciPath;
use crate::device::uevent::DeviceEvents;
use crate::error::{AgentError, Context, Result};

/// How a request names a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockAddress {
    /// Its node.
    Node(PathBuf),
    /// Slots from the root bus.
    Pci(PciPath),
    /// The serial that the VMM gave it: the order of devices without a bus is not fixed.
    Serial(String),
}

impl BlockAddress {
    /// Read the `source` of a storage or the `vm_path` of a device.
    pub fn parse(source: &str) -> Result<Self> {
        if let Some(serial) = source.strip_prefix("serial=") {
            if serial.is_empty() {
                return Err(AgentError::invalid("source", "empty serial"));
            }
            return Ok(Self::Serial(serial.to_owned()));
        }
        if source.starts_with('/') {
            let is_node = source.starts_with("/dev/") && !source.contains("..");
            return if is_node {
                Ok(Self::Node(source.into()))
            } else {
                Err(AgentError::invalid("source", format!("`{source}` is not below /dev")))
            };
        }
        PciPath::parse(source).map(Self::Pci)
    }

    /// The node, None while the device is missing.
    pub fn find(&self, sys: &Path, dev: &Path) -> Result<Option<PathBuf>> {
        let node = match self {
            Self::Node(path) => Some(path.clone()),
            Self::Pci(path) => match path.resolve(sys)? {
                Some(device) => virtio_child_of(&device, "block").map(|name| dev.join(name)),
                None => None,
            },
            Self::Serial(serial) => block_with_serial(sys, serial)?.map(|name| dev.join(name)),
        };
        Ok(node.filter(|node| node.exists()))
    }

    /// Wait for the node.
    ///
    /// # Errors
    /// Not there within `at_most`; not a block device.
    pub fn wait(&self, events: &DeviceEvents, at_most: Duration) -> Result<String> {
        let node = events.wait_for(&format!("{self:?}"), at_most, || {
            Ok(self.find(Path::new("/sys"), Path::new("/dev"))?.filter(|node| answers(node)))
        })?;
        let text = node.to_string_lossy().into_owned();
        let kind = fs::metadata(&node).context("stat", &text)?.file_type();
        if !kind.is_block_device() {
            return Err(AgentError::invalid("source", format!("Invalid device {text}: not a block device")));
        }
        Ok(text)
    }
}

/// Whether the disk behind `node` can be opened. The kernel makes the node of a new disk a moment before the disk itself answers, and
/// its event comes after both.
pub(crate) fn answers(node: &Path) -> bool {
    match fs::File::open(node) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() != Some(libc::ENXIO),
    }
}

/// What a virtio PCI function is in `subsystem`: `<device>/virtioN/<subsystem>/<name>`.
pub(crate) fn virtio_child_of(device: &Path, subsystem: &str) -> Option<String> {
    let entries = fs::read_dir(device).ok()?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("virtio")
            && let Some(child) = fs::read_dir(entry.path().join(subsystem)).ok()?.flatten().next()
        {
            return Some(child.file_name().to_string_lossy().into_owned());
        }
    }
    None
}

fn block_with_serial(sys: &Path, serial: &str) -> Result<Option<String>> {
    let directory = sys.join("block");
    let Ok(entries) = fs::read_dir(&directory) else { return Ok(None) };
    for entry in entries {
        let entry = entry.context("readdir", directory.to_string_lossy())?;
        let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end() == serial {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_when_each_form_then_its_address() {
        assert_eq!(BlockAddress::parse("serial=cm0").expect("parses"), BlockAddress::Serial("cm0".into()));
        assert_eq!(BlockAddress::parse("/dev/vdb").expect("parses"), BlockAddress::Node("/dev/vdb".into()));
        assert!(matches!(BlockAddress::parse("02/00").expect("parses"), BlockAddress::Pci(_)));
        for source in ["serial=", "/etc/passwd", "/dev/../etc", "vda", ""] {
            assert!(BlockAddress::parse(source).is_err(), "{source}");
        }
    }

    #[test]
    fn test_find_when_named_by_slot_or_serial_then_node() {
        let root = tempfile::tempdir().expect("a directory");
        let (sys, dev) = (root.path().join("sys"), root.path().join("dev"));
        fs::create_dir_all(sys.join("devices/pci0000:00/0000:00:05.0/virtio2/block/vdc")).expect("made");
        fs::create_dir_all(sys.join("block/vdc")).expect("made");
        fs::write(sys.join("block/vdc/serial"), "cm-7").expect("written");
        fs::create_dir_all(&dev).expect("made");
        let by_slot = BlockAddress::parse("05").expect("parses");
        let by_serial = BlockAddress::parse("serial=cm-7").expect("parses");
        assert_eq!(by_slot.find(&sys, &dev).expect("looks"), None);
        fs::write(dev.join("vdc"), "").expect("written");
        assert_eq!(by_slot.find(&sys, &dev).expect("looks"), Some(dev.join("vdc")));
        assert_eq!(by_serial.find(&sys, &dev).expect("looks"), Some(dev.join("vdc")));
        let other = BlockAddress::parse("serial=cm-8").expect("parses");
        assert_eq!(other.find(&sys, &dev).expect("looks"), None);
    }
}
