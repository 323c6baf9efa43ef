//! One virtqueue: the ring in guest memory, its kick and call descriptors, and whether it runs.

use std::fs::File;
use std::io::Write as _;
use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::GuestAddress;

use crate::chain::{DescriptorChain, Memory};

/// Largest ring accepted. QEMU makes 128; the bound keeps a batch of replies small.
pub const MAX_RING_SIZE: u16 = 1024;

/// Where a ring lies and how far it has come; what tells a continued ring from a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    descriptors: u64,
    available: u64,
    used: u64,
    size: u16,
    next_available: u16,
}

/// A virtqueue of the device.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    started: bool,
    broken: bool,
    sized: bool,
    addressed: bool,
    stopped_at: Option<Position>,
    added: bool,
}

impl Ring {
    /// A ring that is not set up.
    pub fn new() -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            queue: Queue::new(MAX_RING_SIZE)?,
            kick: None,
            call: None,
            enabled: false,
            started: false,
            broken: false,
            sized: true,
            addressed: false,
            stopped_at: None,
            added: false,
        })
    }

    fn position(&self) -> Position {
        Position {
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            size: self.queue.size(),
            next_available: self.queue.next_avail(),
        }
    }

    /// Number of entries. A ring with a number that can't be is broken until it gets another.
    pub fn set_size(&mut self, size: u32) {
        self.sized = u16::try_from(size).is_ok_and(|size| self.queue.try_set_size(size).is_ok());
    }

    /// Guest addresses of the three parts. A ring with addresses that can't be is broken until it gets others.
    pub fn set_addresses(&mut self, memory: &Memory, addresses: Option<[u64; 3]>) {
        self.addressed = addresses.is_some_and(|[descriptors, available, used]| {
            self.queue.try_set_desc_table_address(GuestAddress(descriptors)).is_ok()
                && self.queue.try_set_avail_ring_address(GuestAddress(available)).is_ok()
                && self.queue.try_set_used_ring_address(GuestAddress(used)).is_ok()
        });
        self.broken = !self.addressed;
        // The protocol carries only the available index; the used one is where the driver left it.
        match self.queue.used_idx(memory, Ordering::Relaxed) {
            Ok(index) => self.queue.set_next_used(index.0),
            Err(_) => self.broken = true,
        }
    }

    /// Index of the next available entry.
    pub fn set_next_available(&mut self, index: u16) {
        self.queue.set_next_avail(index);
    }

    /// Whether the driver negotiated event indices.
    pub fn set_event_index(&mut self, enabled: bool) {
        self.queue.set_event_idx(enabled);
    }

    /// Allow or forbid use.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// The descriptor on which the driver says that it added buffers.
    pub fn kick(&self) -> Option<&File> {
        self.kick.as_ref()
    }

    /// Replace the kick descriptor, return the former.
    pub fn set_kick(&mut self, kick: Option<File>) -> Option<File> {
        std::mem::replace(&mut self.kick, kick)
    }

    /// Replace the descriptor on which we say that we used buffers.
    pub fn set_call(&mut self, call: Option<File>) {
        self.call = call;
    }

    /// Begin to use the ring. True when it goes on where it stopped (or never ran), false when it is a new one.
    pub fn start(&mut self, memory: &Memory) -> bool {
        if self.started {
            return true;
        }
        self.started = true;
        self.added = false;
        self.queue.set_ready(true);
        self.broken = !(self.sized && self.addressed && self.queue.is_valid(memory));
        self.stopped_at.take().is_none_or(|stopped_at| stopped_at == self.position())
    }

    /// Stop using the ring; return the index of the next available entry.
    pub fn stop(&mut self) -> u16 {
        if self.started {
            self.stopped_at = Some(self.position());
        }
        self.started = false;
        self.queue.set_ready(false);
        self.queue.next_avail()
    }

    /// Whether buffers may be taken.
    pub fn is_running(&self) -> bool {
        self.started && self.enabled && !self.broken
    }

    /// Mark as unusable until the driver sets the ring up again.
    fn break_down(&mut self, why: &str) {
        if !self.broken {
            log::warn!("guest vsock ring stopped: {why}");
        }
        self.broken = true;
    }

    /// Take the next chain; None when there is none or the ring can't be used.
    pub fn pop<'a>(&mut self, memory: &'a Memory) -> Option<DescriptorChain<'a>> {
        if !self.is_running() {
            return None;
        }
        let Ok(available) = self.queue.avail_idx(memory, Ordering::Acquire) else {
            self.break_down("its available index can't be read");
            return None;
        };
        let waiting = available - Wrapping(self.queue.next_avail());
        if waiting.0 == 0 {
            return None;
        }
        let chain = self.queue.iter(memory).ok().and_then(|mut chains| chains.next());
        if chain.is_none() {
            self.break_down("its available index or entry can't be");
        }
        chain
    }

    /// Give back the last `count` chains that were taken.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Return a chain to the driver with `written` bytes in it.
    pub fn push_used(&mut self, memory: &Memory, head: u16, written: usize) {
        match self.queue.add_used(memory, head, written as u32) {
            Ok(()) => self.added = true,
            Err(_) => self.break_down("a head index can't be"),
        }
    }

    /// Ask to be kicked when buffers come; true when some have come already.
    pub fn ask_for_kick(&mut self, memory: &Memory) -> bool {
        if !self.is_running() {
            return false;
        }
        let more = self.queue.enable_notification(memory);
        if more.is_err() {
            self.break_down("its used ring can't be written");
        }
        more.unwrap_or(false)
    }

    /// Spare the driver its kicks for now.
    pub fn refuse_kicks(&mut self, memory: &Memory) {
        if self.is_running() && self.queue.disable_notification(memory).is_err() {
            self.break_down("its used ring can't be written");
        }
    }

    /// Tell the driver of used buffers, if there are any and it wants to know.
    pub fn signal(&mut self, memory: &Memory) {
        if !std::mem::take(&mut self.added) {
            return;
        }
        if self.queue.needs_notification(memory).unwrap_or(true)
            && let Some(mut call) = self.call.as_ref()
            && let Err(error) = call.write_all(&1u64.to_ne_bytes())
        {
            log::warn!("the guest can't be notified: {error}");
        }
    }
}
