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
use crate::init::modules::ModuleLoader;

/// Tells waiters that devices came or went. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct DeviceEvents(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    generation: Mutex<u64>,
    changed: Condvar,
}

impl DeviceEvents {
    /// Listen to the kernel from a thread of its own, which also loads the module that a new device asks for.
    pub fn listen(modules: ModuleLoader) -> Result<Self> {
        let events = Self::default();
        let listener = open_listener()?;
        let for_thread = events.clone();
        std::thread::Builder::new()
            .name("uevents".to_owned())
            .spawn(move || for_thread.follow(&listener, &modules))
            .context("start thread", "uevents")?;
        Ok(events)
    }

    fn follow(&self, listener: &OwnedFd, modules: &ModuleLoader) {
        let mut event = [0; 8192];
        loop {
            match recvfrom::<NetlinkAddr>(listener.as_raw_fd(), &mut event) {
                // Only the kernel has port 0; other senders are not believed.
                Ok((bytes, Some(sender))) if sender.pid() == 0 => {
                    if let Some(alias) = added_alias(&event[..bytes]) {
                        load_for(&alias, modules);
                    }
                    self.announce();
                }
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
        find: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        self.wait(what, at_most, Duration::MAX, find)
    }

    /// As [`Self::wait_for`], for something that goes away: the kernel tells of an end a moment before sysfs shows it, and
    /// tells no more afterwards, so sysfs is also looked at without a reason, 20 times a second.
    pub fn wait_for_end<T>(
        &self,
        what: &str,
        at_most: Duration,
        find: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        const LOOK_AGAIN: Duration = Duration::from_millis(50);
        self.wait(what, at_most, LOOK_AGAIN, find)
    }

    fn wait<T>(
        &self,
        what: &str,
        at_most: Duration,
        look_again: Duration,
        mut find: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        let mut seen = *self.0.generation.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = find()? {
                return Ok(found);
            }
            let left = at_most.saturating_sub(started.elapsed());
            if left.is_zero() {
                let after_ms = started.elapsed().as_millis();
                return Err(AgentError::TimedOut { what: what.to_owned(), after_ms });
            }
            let generation = self.0.generation.lock().unwrap_or_else(PoisonError::into_inner);
            let (generation, _) = self
                .0
                .changed
                .wait_timeout_while(generation, left.min(look_again), |generation| *generation == seen)
                .unwrap_or_else(PoisonError::into_inner);
            seen = *generation;
        }
    }
}

/// The alias by which a device that was added asks for its module.
fn added_alias(event: &[u8]) -> Option<String> {
    let mut fields = event.split(|byte| *byte == 0);
    if !fields.clone().any(|field| field == b"ACTION=add") {
        return None;
    }
    let alias = fields.find_map(|field| field.strip_prefix(b"MODALIAS="))?;
    std::str::from_utf8(alias).ok().map(str::to_owned)
}

/// The module of a virtio device, by the number in its alias. Source: virtio specification, device types.
fn module_of(alias: &str) -> Option<&'static str> {
    let number = alias.strip_prefix("virtio:d")?.get(..8)?;
    Some(match u32::from_str_radix(number, 16).ok()? {
        1 => "virtio_net",
        3 => "virtio_console",
        4 => "virtio_rng",
        5 => "virtio_balloon",
        24 => "virtio_mem",
        26 => "virtiofs",
        _ => return None,
    })
}

fn load_for(alias: &str, modules: &ModuleLoader) {
    if let Some(module) = module_of(alias)
        && let Err(error) = modules.load_on_demand(module)
    {
        log::error!("{error}");
    }
}

/// Load the modules of devices that were there before anybody listened.
pub fn load_for_present_devices(modules: &ModuleLoader) -> Result<()> {
    const DEVICES: &str = "/sys/bus/virtio/devices";
    let Ok(devices) = std::fs::read_dir(DEVICES) else { return Ok(()) };
    for device in devices {
        let path = device.context("readdir", DEVICES)?.path().join("modalias");
        load_for(std::fs::read_to_string(&path).context("read", path.to_string_lossy())?.trim(), modules);
    }
    Ok(())
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
    fn test_added_alias_when_a_device_comes_then_its_module_is_known() {
        let event =
            b"add@/devices/x\0ACTION=add\0DEVPATH=/devices/x\0MODALIAS=virtio:d00000001v00001AF4\0SEQNUM=1\0";
        let alias = added_alias(event).expect("has one");
        assert_eq!(module_of(&alias), Some("virtio_net"));
        assert_eq!(added_alias(b"ACTION=remove\0MODALIAS=virtio:d00000001v00001AF4\0"), None);
        assert_eq!(added_alias(b"ACTION=add\0DEVPATH=/x\0"), None);
        for alias in ["virtio:d00000002v0", "pci:v00001AF4", "virtio:d0", "virtio:dzzzzzzzz"] {
            assert_eq!(module_of(alias), None, "{alias}");
        }
    }

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
    fn test_wait_for_end_when_no_event_tells_then_looks_again() {
        let mut calls = 0;
        let found = DeviceEvents::default().wait_for_end("x", Duration::from_secs(10), || {
            calls += 1;
            Ok((calls == 2).then_some(()))
        });
        assert!(found.is_ok());
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
