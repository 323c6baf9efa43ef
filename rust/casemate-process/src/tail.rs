//! The last bytes of a stream.

use std::collections::VecDeque;

/// Most bytes that a tail keeps.
pub const TAIL_BYTES: usize = 64 << 10;

/// Keeps the last [`TAIL_BYTES`] of what is pushed.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<u8>);

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let excess = (self.0.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        self.0.drain(..excess);
        self.0.extend(bytes);
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let (front, back) = self.0.as_slices();
        [front, back].concat()
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
            assert!(tail.0.capacity() <= 2 * TAIL_BYTES);
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
}
