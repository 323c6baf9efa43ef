//! A layer's file as a stream of uncompressed bytes: hashed on both sides of the decoder, counted, bounded.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use flate2::bufread::MultiGzDecoder;
use nix::errno::Errno;
use sha2::{Digest, Sha256};

use crate::{ArchiveError, Layer, Limits};

/// Called about every 50 ms with the compressed bytes read so far; false stops the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> bool;

const BUFFER_BYTES: usize = 256 << 10;
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// Largest zstd window accepted, as a power of two: what `zstd --long` (27) makes by default, and no more memory than that.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// The compressed file, hashed.
struct Source {
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

enum Decoder {
    None(BufReader<Source>),
    Gzip(Box<MultiGzDecoder<BufReader<Source>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<Source>>>),
}

impl Decoder {
    fn source(&self) -> &Source {
        match self {
            Self::None(reader) => reader.get_ref(),
            Self::Gzip(decoder) => decoder.get_ref().get_ref(),
            Self::Zstd(decoder) => decoder.get_ref().get_ref(),
        }
    }

    fn into_source(self) -> Source {
        match self {
            Self::None(reader) => reader.into_inner(),
            Self::Gzip(decoder) => decoder.into_inner().into_inner(),
            Self::Zstd(decoder) => decoder.finish().into_inner(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::None(_) => "tar",
            Self::Gzip(_) => "gzip",
            Self::Zstd(_) => "zstd",
        }
    }
}

impl Read for Decoder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::None(reader) => reader.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// Uncompressed bytes of one layer.
pub(crate) struct LayerStream<'a> {
    decoder: Decoder,
    target: String,
    expected: [u8; 32],
    diff: Option<(Sha256, [u8; 32])>,
    bytes: u64,
    max_bytes: u64,
    progress: Progress<'a>,
    next_report: Instant,
    error: Option<ArchiveError>,
}

impl<'a> LayerStream<'a> {
    pub(crate) fn open(
        layer: &Layer<'_>,
        limits: Limits,
        progress: Progress<'a>,
    ) -> Result<Self, ArchiveError> {
        check_media_type(layer.media_type)?;
        let expected = parse_digest(layer.digest)?;
        let diff_id = layer.diff_id.map(parse_digest).transpose()?;
        let target = layer.path.display().to_string();
        let failed = |op, error: io::Error| ArchiveError::Host {
            op,
            target: target.clone(),
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        // Not to hang on a FIFO that lies where the layer should.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(layer.path);
        let file = file.map_err(|error| failed("open", error))?;
        if !file.metadata().map_err(|error| failed("stat", error))?.is_file() {
            return Err(ArchiveError::Unsupported { what: "layer file", value: target });
        }
        let source = Source { file, hash: Sha256::new(), bytes: 0 };
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, source);
        let start = reader.fill_buf().map_err(|error| failed("read", error))?;
        let decoder = if start.starts_with(&[0x1f, 0x8b]) {
            Decoder::Gzip(Box::new(MultiGzDecoder::new(reader)))
        } else if is_zstd(start) {
            let decoder = zstd::stream::read::Decoder::with_buffer(reader)
                .and_then(|mut decoder| decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map(|()| decoder))
                .map_err(|error| ArchiveError::read(&error, &target, "zstd", 0))?;
            Decoder::Zstd(Box::new(decoder))
        } else if let Some(value) = foreign_compression(start) {
            return Err(ArchiveError::Unsupported { what: "compression", value: value.to_owned() });
        } else {
            Decoder::None(reader)
        };
        // An uncompressed layer's diff_id is its digest: no need to hash it twice.
        let diff = match diff_id {
            Some(wanted) if matches!(decoder, Decoder::None(_)) && wanted == expected => None,
            Some(wanted) => Some((Sha256::new(), wanted)),
            None => None,
        };
        Ok(Self {
            decoder,
            target,
            expected,
            diff,
            bytes: 0,
            max_bytes: limits.max_bytes,
            progress,
            next_report: Instant::now() + PROGRESS_EVERY,
            error: None,
        })
    }

    /// Why reading failed, once.
    pub(crate) fn take_error(&mut self) -> Option<ArchiveError> {
        self.error.take()
    }

    /// Read what is left, check both digests, return the uncompressed size.
    pub(crate) fn finish(mut self) -> Result<u64, ArchiveError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match self.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    return Err(self.error.take().unwrap_or_else(|| {
                        ArchiveError::read(&error, &self.target, self.decoder.name(), self.bytes)
                    }));
                }
            }
        }
        let Self { decoder, target, expected, diff, bytes, .. } = self;
        let mut source = decoder.into_source();
        // What a decoder did not ask for is part of the digest too.
        io::copy(&mut source, &mut io::sink())
            .map_err(|error| ArchiveError::read(&error, &target, "tar", bytes))?;
        check_digest("digest", source.hash, &expected)?;
        if let Some((hash, wanted)) = diff {
            check_digest("diff_id", hash, &wanted)?;
        }
        Ok(bytes)
    }

    fn fail(&mut self, error: ArchiveError) -> io::Error {
        self.error.get_or_insert(error);
        io::Error::other("layer stream failed")
    }
}

impl Read for LayerStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = match self.decoder.read(buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                let error = ArchiveError::read(&error, &self.target, self.decoder.name(), self.bytes);
                return Err(self.fail(error));
            }
        };
        self.bytes += n as u64;
        if self.bytes > self.max_bytes {
            let limit_bytes = self.max_bytes;
            return Err(self.fail(ArchiveError::TooLarge { limit_bytes }));
        }
        if let Some((hash, _)) = &mut self.diff {
            hash.update(&buffer[..n]);
        }
        let now = Instant::now();
        if now >= self.next_report || n == 0 {
            self.next_report = now + PROGRESS_EVERY;
            let read = self.decoder.source().bytes;
            if !(self.progress)(read) {
                return Err(self.fail(ArchiveError::Stopped));
            }
        }
        Ok(n)
    }
}

fn check_media_type(media_type: &str) -> Result<(), ArchiveError> {
    const KNOWN: [&str; 7] = [
        "",
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
    ];
    if KNOWN.contains(&media_type) {
        return Ok(());
    }
    Err(ArchiveError::Unsupported { what: "media type", value: media_type.to_owned() })
}

/// A zstd frame, or a skippable frame (which may come first).
pub(crate) fn is_zstd(start: &[u8]) -> bool {
    start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || (start.len() >= 4 && start[0] & 0xf0 == 0x50 && start[1..4] == [0x2a, 0x4d, 0x18])
}

fn foreign_compression(start: &[u8]) -> Option<&'static str> {
    const MAGICS: [(&[u8], &str); 4] =
        [(b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2"), (b"\x04\x22\x4d\x18", "lz4"), (b"PK\x03\x04", "zip")];
    MAGICS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, name)| *name)
}

fn parse_digest(text: &str) -> Result<[u8; 32], ArchiveError> {
    let unsupported = || ArchiveError::Unsupported { what: "digest", value: text.to_owned() };
    let hex = text.strip_prefix("sha256:").filter(|hex| hex.len() == 64).ok_or_else(unsupported)?;
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        let (high, low) = nibble(pair[0]).zip(nibble(pair[1])).ok_or_else(unsupported)?;
        *byte = high << 4 | low;
    }
    Ok(digest)
}

fn format_digest(digest: &[u8]) -> String {
    digest.iter().fold(String::from("sha256:"), |mut text, byte| {
        text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
        text.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
        text
    })
}

fn check_digest(what: &'static str, hash: Sha256, expected: &[u8; 32]) -> Result<(), ArchiveError> {
    let actual = hash.finalize();
    if actual.as_slice() == expected {
        return Ok(());
    }
    Err(ArchiveError::Digest { what, expected: format_digest(expected), actual: format_digest(&actual) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn test_parse_digest_when_form_is_right_then_it_comes_back() {
        let text = format!("sha256:{}", "0af9".repeat(16));
        assert_eq!(format_digest(&parse_digest(&text).unwrap()), text);
    }

    #[test]
    fn test_parse_digest_when_form_is_wrong_then_it_is_named() {
        for text in ["", "sha256:", "sha512:00", &format!("sha256:{}", "0AF9".repeat(16)), "md5:0"] {
            assert!(
                matches!(parse_digest(text), Err(ArchiveError::Unsupported { what: "digest", .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn test_is_zstd_when_frame_is_skippable_then_true() {
        assert!(is_zstd(&[0x5a, 0x2a, 0x4d, 0x18]));
        assert!(!is_zstd(&[0x5a, 0x2a]));
    }
}
