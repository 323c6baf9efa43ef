//! PCI paths: the slots (and functions) on the way from the root bus to a device.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{AgentError, Context, Result};

/// Slot and function of a device on its bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SlotFunction {
    slot: u8,
    function: u8,
}

impl SlotFunction {
    fn parse(text: &str) -> Option<Self> {
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let is_hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hex(slot) || !is_hex(function) {
            return None;
        }
        let parsed = Self {
            slot: u8::from_str_radix(slot, 16).ok()?,
            function: u8::from_str_radix(function, 16).ok()?,
        };
        (parsed.slot <= 0x1f && parsed.function <= 7).then_some(parsed)
    }

    fn address_on(self, bus: &str) -> String {
        format!("{bus}:{:02x}.{:x}", self.slot, self.function)
    }
}

/// Text `SS[.F]/SS[.F]/…`: hexadecimal slots from the root bus to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciPath(Vec<SlotFunction>);

impl PciPath {
    /// Read the text.
    ///
    /// # Errors
    /// Empty, slots above 1f, functions above 7, other characters.
    pub fn parse(text: &str) -> Result<Self> {
        text.split('/')
            .map(SlotFunction::parse)
            .collect::<Option<Vec<_>>>()
            .map(Self)
            .ok_or_else(|| AgentError::invalid("source", format!("`{text}` is not a PCI path")))
    }

    /// The device's directory below `sys` (`/sys`), None while it or a bridge before it is missing.
    ///
    /// # Errors
    /// A bridge has several buses.
    pub fn resolve(&self, sys: &Path) -> Result<Option<PathBuf>> {
        let mut directory = sys.join("devices/pci0000:00");
        let mut bus = "0000:00".to_owned();
        for (index, element) in self.0.iter().enumerate() {
            directory.push(element.address_on(&bus));
            if !directory.exists() {
                return Ok(None);
            }
            if index + 1 < self.0.len() {
                match only_bus_of(&directory)? {
                    Some(next) => bus = next,
                    None => return Ok(None),
                }
            }
        }
        Ok(Some(directory))
    }
}

/// The bus behind a bridge.
fn only_bus_of(bridge: &Path) -> Result<Option<String>> {
    let directory = bridge.join("pci_bus");
    let Ok(entries) = fs::read_dir(&directory) else { return Ok(None) };
    let mut buses = Vec::new();
    for entry in entries {
        let entry = entry.context("readdir", directory.to_string_lossy())?;
        buses.push(entry.file_name().to_string_lossy().into_owned());
    }
    if buses.len() > 1 {
        let problem = format!("bridge {} has several buses", bridge.to_string_lossy());
        return Err(AgentError::invalid("source", problem));
    }
    Ok(buses.pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_when_text_is_right_then_slots_and_functions() {
        let slot = |slot, function| SlotFunction { slot, function };
        assert_eq!(PciPath::parse("05").expect("parses").0, [slot(5, 0)]);
        assert_eq!(PciPath::parse("1f/00.7").expect("parses").0, [slot(0x1f, 0), slot(0, 7)]);
    }

    #[test]
    fn test_parse_when_text_is_wrong_then_refused() {
        for text in ["", "/", "20", "05/", "1.8", "+5", "05//01", "0x5", "5.", "100"] {
            assert!(PciPath::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn test_resolve_when_behind_a_bridge_then_bus_of_the_bridge_is_used() {
        let sys = tempfile::tempdir().expect("a directory");
        let bridge = sys.path().join("devices/pci0000:00/0000:00:02.0");
        fs::create_dir_all(bridge.join("pci_bus/0000:07")).expect("made");
        let path = PciPath::parse("02/00").expect("parses");
        assert_eq!(path.resolve(sys.path()).expect("resolves"), None);
        let device = bridge.join("0000:07:00.0");
        fs::create_dir(&device).expect("made");
        assert_eq!(path.resolve(sys.path()).expect("resolves"), Some(device));
        fs::create_dir(bridge.join("pci_bus/0000:08")).expect("made");
        assert!(path.resolve(sys.path()).is_err());
    }
}
