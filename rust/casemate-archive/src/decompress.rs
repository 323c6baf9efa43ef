//! One compressed block in memory, whole and bounded: kernel payloads, modules.

use std::io::Read;

use flate2::read::MultiGzDecoder;

use crate::ArchiveError;

/// Compression of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// LZ4 in the legacy frame that the kernel's build makes.
    Lz4Legacy,
    /// Zstandard frames.
    Zstd,
    /// Gzip members.
    Gzip,
}

const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Every block of a legacy frame but the last holds this much.
const LZ4_LEGACY_BLOCK_BYTES: usize = 8 << 20;

/// Decompress `data`, at most to `max_bytes`.
///
/// # Errors
/// [`ArchiveError::Decode`], [`ArchiveError::Truncated`] or [`ArchiveError::TooLarge`].
pub fn decompress(data: &[u8], format: Format, max_bytes: u64) -> Result<Vec<u8>, ArchiveError> {
    match format {
        Format::Lz4Legacy => lz4_legacy(data, max_bytes),
        Format::Gzip => read_bounded(MultiGzDecoder::new(data), "gzip", max_bytes),
        Format::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(data);
            let decoder = decoder.map_err(|error| ArchiveError::read(&error, "data", "zstd", 0))?;
            read_bounded(decoder, "zstd", max_bytes)
        }
    }
}

fn read_bounded(reader: impl Read, format: &'static str, max_bytes: u64) -> Result<Vec<u8>, ArchiveError> {
    let mut output = Vec::new();
    reader
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut output)
        .map_err(|error| ArchiveError::read(&error, "data", format, output.len() as u64))?;
    if output.len() as u64 > max_bytes {
        return Err(ArchiveError::TooLarge { limit_bytes: max_bytes });
    }
    Ok(output)
}

fn lz4_legacy(data: &[u8], max_bytes: u64) -> Result<Vec<u8>, ArchiveError> {
    let damaged = |detail: &str| ArchiveError::Decode { format: "lz4-legacy", detail: detail.to_owned() };
    let mut rest = data.strip_prefix(&LZ4_LEGACY_MAGIC).ok_or_else(|| damaged("no magic number"))?;
    let mut output: Vec<u8> = Vec::new();
    let mut block = vec![0; LZ4_LEGACY_BLOCK_BYTES];
    while !rest.is_empty() {
        let cut = || ArchiveError::Truncated { offset: output.len() as u64, what: "an lz4 block" };
        let (length, after) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        // Frames may follow each other.
        if *length == LZ4_LEGACY_MAGIC {
            rest = after;
            continue;
        }
        let length = u32::from_le_bytes(*length) as usize;
        let compressed = after.get(..length).ok_or_else(cut)?;
        rest = &after[length..];
        let n = lz4_flex::block::decompress_into(compressed, &mut block)
            .map_err(|error| damaged(&error.to_string()))?;
        if (output.len() + n) as u64 > max_bytes {
            return Err(ArchiveError::TooLarge { limit_bytes: max_bytes });
        }
        output.extend_from_slice(&block[..n]);
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use super::*;

    const BYTES: u64 = 200_000;

    fn sample() -> Vec<u8> {
        (0..50_000_u32).flat_map(|i| (i / 7).to_le_bytes()).collect()
    }

    fn legacy(data: &[u8]) -> Vec<u8> {
        let mut frame = LZ4_LEGACY_MAGIC.to_vec();
        for block in data.chunks(LZ4_LEGACY_BLOCK_BYTES) {
            let compressed = lz4_flex::block::compress(block);
            frame.extend(u32::try_from(compressed.len()).unwrap().to_le_bytes());
            frame.extend(compressed);
        }
        frame
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn test_decompress_when_data_is_whole_then_it_comes_back() {
        let data = sample();
        for (format, compressed) in [
            (Format::Lz4Legacy, legacy(&data)),
            (Format::Gzip, gzip(&data)),
            (Format::Zstd, zstd::encode_all(&data[..], 1).unwrap()),
        ] {
            assert!(decompress(&compressed, format, BYTES).unwrap() == data, "{format:?}");
        }
    }

    #[test]
    fn test_decompress_when_lz4_has_several_blocks_then_all() {
        let data = vec![7; LZ4_LEGACY_BLOCK_BYTES + 5];
        assert!(decompress(&legacy(&data), Format::Lz4Legacy, u64::MAX).unwrap() == data);
    }

    #[test]
    fn test_decompress_when_two_frames_follow_then_both() {
        let data = sample();
        for (format, mut compressed) in [(Format::Lz4Legacy, legacy(&data)), (Format::Gzip, gzip(&data))] {
            compressed.extend(compressed.clone());
            assert_eq!(
                decompress(&compressed, format, u64::MAX).unwrap().len() as u64,
                2 * BYTES,
                "{format:?}"
            );
        }
    }

    #[test]
    fn test_decompress_when_larger_than_bound_then_too_large() {
        let data = sample();
        for (format, compressed) in [
            (Format::Lz4Legacy, legacy(&data)),
            (Format::Gzip, gzip(&data)),
            (Format::Zstd, zstd::encode_all(&data[..], 1).unwrap()),
        ] {
            let result = decompress(&compressed, format, BYTES - 1);
            assert!(matches!(result, Err(ArchiveError::TooLarge { limit_bytes: 199_999 })), "{format:?}");
        }
    }

    #[test]
    fn test_decompress_when_cut_short_then_truncated() {
        let data = sample();
        for (format, compressed) in [
            (Format::Lz4Legacy, legacy(&data)),
            (Format::Gzip, gzip(&data)),
            (Format::Zstd, zstd::encode_all(&data[..], 1).unwrap()),
        ] {
            let result = decompress(&compressed[..compressed.len() - 9], format, u64::MAX);
            assert!(matches!(result, Err(ArchiveError::Truncated { .. })), "{format:?} {result:?}");
        }
    }

    #[test]
    fn test_decompress_when_not_the_format_then_decode_error() {
        for format in [Format::Lz4Legacy, Format::Gzip, Format::Zstd] {
            let result = decompress(b"no such thing as compressed data", format, u64::MAX);
            assert!(matches!(result, Err(ArchiveError::Decode { .. })), "{format:?} {result:?}");
        }
    }
}
