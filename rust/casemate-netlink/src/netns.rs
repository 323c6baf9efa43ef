//! Work in another network namespace.

use std::os::fd::BorrowedFd;

use nix::sched::{CloneFlags, setns};

use crate::NetlinkError;

/// Call `work` in the network namespace `netns`, on a thread of its own: the caller's threads never leave theirs.
pub(crate) fn inside<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, NetlinkError> + Send,
) -> Result<T, NetlinkError> {
    std::thread::scope(|scope| {
        let entered =
            std::thread::Builder::new().name("casemate-netns".to_owned()).spawn_scoped(scope, || {
                setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| NetlinkError::System {
                    op: "entering",
                    target: "the network namespace".to_owned(),
                    errno,
                })?;
                work()
            });
        match entered {
            Err(error) => Err(NetlinkError::io("starting", "a thread", &error)),
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        }
    })
}
