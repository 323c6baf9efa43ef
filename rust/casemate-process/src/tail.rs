//! The last bytes of a stream.

use std::collections::VecDeque;

/// Most bytes that a tail keeps.
pub const TAIL_BYTES: usize = 64 << 10;

/// Keeps the last [`TAIL_BYTES`] of what is pushed.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    kept: VecDeque<u8>,
    pushed_bytes: u64,
}

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.pushed_bytes += bytes.len() as u64;
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let excess = (self.kept.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        self.kept.drain(..excess);
        self.kept.extend(bytes);
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let (front, back) = self.kept.as_slices();
        [front, back].concat()
    }

    /// What is kept of the bytes behind the first `position` ones of the stream, and the stream's length so far.
    pub(crate) fn since(&self, position: u64) -> (Vec<u8>, u64) {
        let wanted = usize::try_from(self.pushed_bytes.saturating_sub(position)).unwrap_or(usize::MAX);
        let skipped = self.kept.len().saturating_sub(wanted);
        (self.kept.iter().skip(skipped).copied().collect(), self.pushed_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn push_when_more_comes_than_fits_then_the_last_bytes_are_kept() {
        let all: Vec<u8> = (0..200_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        for step in [1, 1000, TAIL_BYTES - 1, TAIL_BYTES, TAIL_BYTES + 1, all.len()] {
            let mut tail = Tail::default();
            all.chunks(step).for_each(|chunk| tail.push(chunk));
            assert_eq!(tail.to_vec(), all[all.len() - TAIL_BYTES..], "in steps of {step}");
            assert!(tail.kept.capacity() <= 2 * TAIL_BYTES);
        }
    }

    #[test]
    fn push_when_less_comes_than_fits_then_all_is_kept() {
        let mut tail = Tail::default();
        tail.push(b"ab");
        tail.push(b"");
        tail.push(b"c");
        assert_eq!(tail.to_vec(), b"abc");
    }

    #[test]
    fn since_when_asked_from_a_position_then_only_what_is_new_and_kept_is_given() {
        let mut tail = Tail::default();
        tail.push(b"abc");
        assert_eq!(tail.since(0), (b"abc".to_vec(), 3));
        assert_eq!(tail.since(2), (b"c".to_vec(), 3));
        assert_eq!(tail.since(3), (Vec::new(), 3));
        assert_eq!(tail.since(9), (Vec::new(), 3));
        tail.push(&vec![b'x'; 2 * TAIL_BYTES]);
        let (kept, position) = tail.since(3);
        assert_eq!((kept.len(), position), (TAIL_BYTES, 3 + 2 * TAIL_BYTES as u64));
    }
}
