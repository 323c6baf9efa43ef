//! Waiting for devices: the kernel's events say that something changed, sysfs says what is there.
//!
//! Events are only a reason to look again, so none that came before anybody waited is missed and none is kept.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt, socket, sockopt,
};

use crate::error::{AgentError, Context, Result};

/// Tells waiters that devices came or went. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct DeviceEvents(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    generation: Mutex<u64>,
    changed: Condvar,
}

impl DeviceEvents {
    /// Listen to the kernel from a thread of its own.
    pub fn listen() -> Result<Self> {
        let events = Self::default();
        let listener = open_listener()?;
        let for_thread = events.clone();
        std::thread::Builder::new()
            .name("uevents".to_owned())
            .spawn(move || for_thread.follow(&listener))
            .context("start thread", "uevents")?;
        Ok(events)
    }

    fn follow(&self, listener: &OwnedFd) {
        let mut event = [0; 8192];
        loop {
            match recvfrom::<NetlinkAddr>(listener.as_raw_fd(), &mut event) {
                // Only the kernel has port 0; other senders are not believed.
                Ok((_, Some(sender))) if sender.pid() == 0 => self.announce(),
                // The queue overran: events are lost, looking again makes up for it.
                Err(Errno::ENOBUFS) => self.announce(),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    log::error!("device events ended: {errno}");
                    return;
                }
            }
        }
    }

    /// Make every waiter look again.
    pub fn announce(&self) {
        *self.0.generation.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.changed.notify_all();
    }

    /// Call `find` now and after every event until it finds something.
    ///
    /// # Errors
    /// What `find` fails with; `TimedOut` naming `what` when nothing was found within `at_most`.
    pub fn wait_for<T>(
        &self,
        what: &str,
        at_most: Duration,
        mut find: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        let mut seen = *self.0.generation.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = find()? {
                return Ok(found);
            }
            let left = at_most.saturating_sub(started.elapsed());
            let generation = self.0.generation.lock().unwrap_or_else(PoisonError::into_inner);
            let (generation, timeout) = self
                .0
                .changed
                .wait_timeout_while(generation, left, |generation| *generation == seen)
                .unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                let after_ms = started.elapsed().as_millis();
                return Err(AgentError::TimedOut { what: what.to_owned(), after_ms });
            }
            seen = *generation;
        }
    }
}

fn open_listener() -> Result<OwnedFd> {
    const QUEUE_BYTES: usize = 1 << 20;
    const KERNEL_EVENTS: u32 = 1;
    let listener = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .context("socket", "uevents")?;
    setsockopt(&listener, sockopt::RcvBuf, &QUEUE_BYTES).context("set queue of", "uevents")?;
    bind(listener.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS)).context("bind", "uevents")?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_wait_for_when_there_already_then_at_once() {
        let found = DeviceEvents::default().wait_for("x", Duration::ZERO, || Ok(Some(5)));
        assert_eq!(found.expect("found"), 5);
    }

    #[test]
    fn test_wait_for_when_it_comes_with_an_event_then_found() {
        let events = DeviceEvents::default();
        let announcer = events.clone();
        let mut calls = 0;
        let found = events.wait_for("x", Duration::from_secs(10), || {
            calls += 1;
            if calls == 1 {
                announcer.announce();
            }
            Ok((calls == 2).then_some(calls))
        });
        assert_eq!(found.expect("found"), 2);
    }

    #[test]
    fn test_wait_for_when_it_never_comes_then_error_names_it() {
        let nothing = || Ok(None::<()>);
        let error = DeviceEvents::default()
            .wait_for("disk 05", Duration::from_millis(1), nothing)
            .expect_err("absent");
        assert!(error.to_string().contains("disk 05"), "{error}");
    }
}
