//! A descriptor chain as checked slices of guest memory.
//!
//! The guest may split header and data over descriptors as it likes (kernels from 6.2 on send three and more), so
//! nothing here assumes a layout. Each slice is inside a mapped region; its bytes can change at any time.

use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use crate::packet::{HEADER_BYTES, Header};

/// Mapped memory of the guest.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

/// A chain that is not walked to its end yet.
pub type DescriptorChain<'a> = virtio_queue::DescriptorChain<&'a Memory>;

/// Most pieces in one chain. The kernel's largest packet has 64 KiB, 17 pages and a header; `sendmsg` takes 1,024.
pub const MAX_SEGMENTS: usize = 256;

/// Who wrote the chain's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest: all descriptors are device-readable.
    FromGuest,
    /// We will: all descriptors are device-writable.
    ToGuest,
}

/// Why a chain can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor leads out of its table, in a circle, or to a nested table.
    Broken,
    /// A descriptor of the other direction.
    WrongDirection,
    /// An address outside of guest memory.
    OutsideMemory,
    /// More than [`MAX_SEGMENTS`] pieces.
    TooLong,
    /// No room for a header.
    TooShort,
}

/// Replace `segments` with those of `chain`; return their bytes, at least [`HEADER_BYTES`].
pub fn gather<'a>(
    memory: &'a Memory,
    mut chain: DescriptorChain<'a>,
    direction: Direction,
    segments: &mut Vec<VolatileSlice<'a>>,
) -> Result<usize, ChainError> {
    segments.clear();
    let mut bytes = 0;
    let mut more = true;
    let access = match direction {
        Direction::FromGuest => Permissions::Read,
        Direction::ToGuest => Permissions::Write,
    };
    for descriptor in &mut chain {
        more = descriptor.has_next();
        if descriptor.is_write_only() != (direction == Direction::ToGuest) {
            return Err(ChainError::WrongDirection);
        }
        let slices = GuestMemory::get_slices(memory, descriptor.addr(), descriptor.len() as usize, access)
            .map_err(|_| ChainError::OutsideMemory)?;
        for slice in slices {
            if segments.len() == MAX_SEGMENTS {
                return Err(ChainError::TooLong);
            }
            let slice = slice.map_err(|_| ChainError::OutsideMemory)?;
            bytes += slice.len();
            segments.push(slice);
        }
    }
    if more {
        // The walk ended at a descriptor that names a next one: the iterator found that one unusable.
        return Err(ChainError::Broken);
    }
    if bytes < HEADER_BYTES {
        return Err(ChainError::TooShort);
    }
    Ok(bytes)
}

/// Take `bytes` off the front; `bytes` is at most what is there.
fn advance<'a>(segments: &mut Vec<VolatileSlice<'a>>, mut bytes: usize) {
    let whole = segments
        .iter()
        .take_while(|slice| {
            let inside = slice.len() <= bytes;
            bytes -= if inside { slice.len() } else { 0 };
            inside
        })
        .count();
    segments.drain(..whole);
    if bytes > 0
        && let Some(first) = segments.first_mut()
        && let Ok(rest) = first.offset(bytes)
    {
        *first = rest;
    }
}

/// Keep only the first `bytes`.
pub fn truncate(segments: &mut Vec<VolatileSlice<'_>>, mut bytes: usize) {
    let mut keep = 0;
    for slice in segments.iter_mut() {
        if bytes == 0 {
            break;
        }
        if slice.len() > bytes
            && let Ok(part) = slice.subslice(0, bytes)
        {
            *slice = part;
        }
        bytes -= slice.len().min(bytes);
        keep += 1;
    }
    segments.truncate(keep);
}

/// Copy the header out (once: the guest may change it meanwhile) and leave the data in `segments`.
pub fn take_header(segments: &mut Vec<VolatileSlice<'_>>) -> Header {
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = 0;
    for slice in segments.iter() {
        if filled == HEADER_BYTES {
            break;
        }
        filled += slice.copy_to(&mut bytes[filled..]);
    }
    advance(segments, HEADER_BYTES);
    Header::decode(&bytes)
}

/// Write the header to the front of `segments`, which [`gather`] found large enough.
pub fn put_header(segments: &[VolatileSlice<'_>], header: &Header) {
    let bytes = header.encode();
    let mut written = 0;
    for slice in segments {
        if written == HEADER_BYTES {
            break;
        }
        let part = slice.len().min(HEADER_BYTES - written);
        slice.copy_from(&bytes[written..written + part]);
        written += part;
    }
}

/// Append all but the first `skip` bytes, at most `limit_bytes`, as iovecs; return their bytes.
///
/// The pointers are valid as long as the memory that `segments` borrows.
pub fn push_iovecs(
    segments: &[VolatileSlice<'_>],
    mut skip: usize,
    limit_bytes: usize,
    iovecs: &mut Vec<libc::iovec>,
) -> usize {
    let mut bytes = 0;
    for slice in segments {
        let skipped = slice.len().min(skip);
        skip -= skipped;
        let part = (slice.len() - skipped).min(limit_bytes - bytes);
        if part > 0 {
            // In bounds: `skipped` is less than the slice's length, as something is left of it.
            let base = slice.ptr_guard_mut().as_ptr().wrapping_add(skipped);
            iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: part });
            bytes += part;
        }
    }
    bytes
}
