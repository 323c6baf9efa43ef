//! Counters that other threads read while the backend runs.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only the backend's thread changes.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters as the thread keeps them.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) connections_open: Counter,
    pub(crate) connections_total: Counter,
    pub(crate) packets_in_total: Counter,
    pub(crate) packets_out_total: Counter,
    pub(crate) packets_dropped_total: Counter,
    pub(crate) resets_total: Counter,
    pub(crate) bytes_in_total: Counter,
    pub(crate) bytes_out_total: Counter,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> Stats {
        Stats {
            connections_open: self.connections_open.get(),
            connections_total: self.connections_total.get(),
            packets_in_total: self.packets_in_total.get(),
            packets_out_total: self.packets_out_total.get(),
            packets_dropped_total: self.packets_dropped_total.get(),
            resets_total: self.resets_total.get(),
            bytes_in_total: self.bytes_in_total.get(),
            bytes_out_total: self.bytes_out_total.get(),
        }
    }
}

/// Counters at one moment. «In» is from the guest, «out» to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections now, also those still greeting or closing.
    pub connections_open: u64,
    /// Connections that either side began.
    pub connections_total: u64,
    /// Packets from the guest.
    pub packets_in_total: u64,
    /// Packets to the guest.
    pub packets_out_total: u64,
    /// Packets from the guest that could not be read or did not come from it.
    pub packets_dropped_total: u64,
    /// RST packets in either direction.
    pub resets_total: u64,
    /// Bytes of data from the guest.
    pub bytes_in_total: u64,
    /// Bytes of data to the guest.
    pub bytes_out_total: u64,
}
