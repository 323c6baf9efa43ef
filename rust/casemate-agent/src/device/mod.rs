//! Devices of the guest: where they are in sysfs, and waiting for them.

pub mod block;
pub mod pci;
pub mod presence;
pub mod uevent;
