//! The end of the guest.

use std::path::Path;

use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::sync;

/// Write back file systems and end the machine. Does not return.
///
/// A machine without ACPI cannot power off and would halt for ever; there a restart is asked for, which ends the VMM when it
/// was told not to reboot.
pub fn power_off() -> ! {
    sync();
    let mode = if Path::new("/sys/firmware/acpi").exists() {
        RebootMode::RB_POWER_OFF
    } else {
        RebootMode::RB_AUTOBOOT
    };
    let result = reboot(mode);
    // Only a missing capability gets here, which PID 1 has: end all the same, the kernel panics.
    log::error!("{mode:?} failed: {result:?}");
    std::process::exit(1);
}
