//! Leaving the process that started this one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use nix::unistd::{ForkResult, fork, setsid};

/// Go on as a process of a session of its own that nobody waits for; the one that was started ends with status 0.
///
/// Call it before anything else: there must be no thread yet. Standard streams are `/dev/null` after it. The parent-death
/// signal that came from the starter is gone with the fork.
///
/// # Errors
/// When the kernel refuses; nothing has happened then.
pub fn detach() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: this process has one thread, as the caller vouches, so the child may do whatever it wants.
    match unsafe { fork() }? {
        // SAFETY: ends this process without running what the child owns now.
        ForkResult::Parent { .. } => unsafe { libc::_exit(0) },
        ForkResult::Child => {}
    }
    setsid()?;
    std::env::set_current_dir("/")?;
    for target in 0..3 {
        // SAFETY: both are open descriptors; standard streams belong to nobody in this process.
        if unsafe { libc::dup2(null.as_raw_fd(), target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
