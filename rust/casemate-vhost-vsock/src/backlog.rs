//! Bytes that a socket did not take yet, first in, first out.

use vm_memory::VolatileSlice;

/// A buffer that grew beyond this is given back to the allocator when it is empty.
const KEPT_BYTES: usize = 16 << 10;

/// A queue of bytes; its owner bounds it by what it admits.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// What waits.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Append a copy of guest memory.
    pub fn append(&mut self, slice: &VolatileSlice<'_>) {
        self.bytes.drain(..self.start);
        self.start = 0;
        let from = self.bytes.len();
        self.bytes.resize(from + slice.len(), 0);
        slice.copy_to(&mut self.bytes[from..]);
    }

    /// Forget the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            self.clear();
        }
    }

    /// Forget everything.
    pub fn clear(&mut self) {
        self.start = 0;
        self.bytes.clear();
        if self.bytes.capacity() > KEPT_BYTES {
            self.bytes = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_backlog_when_filled_and_drained_in_parts_then_order_is_kept_and_memory_given_back() {
        let mut source: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let expected = source.clone();
        let mut backlog = Backlog::default();
        let mut drained = Vec::new();
        for part in source.chunks_mut(30_000) {
            backlog.append(&VolatileSlice::from(part));
            drained.extend_from_slice(&backlog.as_slice()[..7_000]);
            backlog.consume(7_000);
        }
        drained.extend_from_slice(backlog.as_slice());
        backlog.consume(backlog.as_slice().len());
        assert_eq!(drained, expected);
        assert!(backlog.is_empty() && backlog.bytes.capacity() <= KEPT_BYTES);
    }
}
