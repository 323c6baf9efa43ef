//! Packets into the guest's buffers.

use crate::chain::{Direction, Memory, gather, push_iovecs, put_header};
use crate::endpoint::{Endpoint, Received};
use crate::packet::{HEADER_BYTES, Header};
use crate::ring::Ring;
use vm_memory::VolatileSlice;

/// Most bytes of data read from a socket at once.
const MAX_BATCH_BYTES: usize = 64 << 10;
/// Most buffers filled by one read. The kernel's have 4 KiB.
const MAX_BUFFERS: usize = 17;
/// Buffers offered to a connection whose last read was small.
const MIN_BUFFERS: usize = 2;

/// A buffer of the guest, large enough for a header.
pub struct Buffer<'a> {
    head: u16,
    segments: Vec<VolatileSlice<'a>>,
    data_bytes: usize,
}

impl Buffer<'_> {
    /// Send a packet without data in it.
    pub fn put(&self, ring: &mut Ring, memory: &Memory, header: &Header) {
        put_header(&self.segments, header);
        ring.push_used(memory, self.head, HEADER_BYTES);
    }
}

/// Take the next usable buffer, give unusable ones back empty. None when the guest has left none.
pub fn take_buffer<'a>(ring: &mut Ring, memory: &'a Memory) -> Option<Buffer<'a>> {
    take(ring, memory, true)
}

/// As [`take_buffer`]; without `skip_unusable` an unusable buffer stays in the ring.
fn take<'a>(ring: &mut Ring, memory: &'a Memory, skip_unusable: bool) -> Option<Buffer<'a>> {
    loop {
        let chain = ring.pop(memory)?;
        let head = chain.head_index();
        let mut segments = Vec::with_capacity(1);
        match gather(memory, chain, Direction::ToGuest, &mut segments) {
            Ok(bytes) => return Some(Buffer { head, segments, data_bytes: bytes - HEADER_BYTES }),
            Err(error) if skip_unusable => {
                log::debug!("a buffer of the guest can't be used: {error:?}");
                ring.push_used(memory, head, 0);
            }
            Err(_) => {
                ring.unpop(1);
                return None;
            }
        }
    }
}

/// How many buffers a connection's next read is worth.
#[derive(Debug)]
pub struct Batch {
    buffers: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { buffers: MIN_BUFFERS }
    }
}

impl Batch {
    /// Read at most `limit_bytes` (not zero) from `endpoint` straight into buffers of the guest, each behind a copy of `header`.
    ///
    /// Returns what came and how many packets that made; None when the guest has no buffer.
    pub fn receive(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        endpoint: &mut Endpoint,
        header: &Header,
        limit_bytes: usize,
    ) -> Option<(Received, u64)> {
        let limit_bytes = limit_bytes.min(MAX_BATCH_BYTES);
        let mut buffers: Vec<Buffer<'_>> = Vec::with_capacity(self.buffers);
        let mut iovecs = Vec::with_capacity(self.buffers);
        let mut wanted = 0;
        while buffers.len() < self.buffers && wanted < limit_bytes {
            let Some(buffer) = take(ring, memory, buffers.is_empty()) else { break };
            if buffer.data_bytes == 0 {
                if buffers.is_empty() {
                    // Room for a header only: no use for data, and kept it would block the ring.
                    ring.push_used(memory, buffer.head, 0);
                    continue;
                }
                ring.unpop(1);
                break;
            }
            wanted += push_iovecs(&buffer.segments, HEADER_BYTES, limit_bytes - wanted, &mut iovecs);
            buffers.push(buffer);
        }
        if buffers.is_empty() {
            return None;
        }
        // SAFETY: the iovecs lie in mapped guest memory that `memory` keeps mapped; anybody may write there.
        let received = unsafe { endpoint.receive(&mut iovecs, wanted) };
        let bytes = if let Received::Bytes(bytes) = received { bytes } else { 0 };
        let mut left = bytes;
        let mut used = 0;
        for buffer in &buffers {
            if left == 0 {
                break;
            }
            let part = buffer.data_bytes.min(left);
            put_header(&buffer.segments, &Header { data_bytes: part as u32, ..*header });
            ring.push_used(memory, buffer.head, HEADER_BYTES + part);
            left -= part;
            used += 1;
        }
        ring.unpop((buffers.len() - used) as u16);
        self.buffers = if bytes == wanted { self.buffers * 2 } else { used };
        self.buffers = self.buffers.clamp(MIN_BUFFERS, MAX_BUFFERS);
        Some((received, used as u64))
    }
}
