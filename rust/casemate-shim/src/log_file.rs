//! A container's output on disk: lines as container runtimes write them, in two files of a bounded size.
//!
//! Each entry is `<time> <stdout|stderr> <F|P> <text>\n`. `F` ends a line of the container, `P` is a part that is continued by
//! the stream's next entry; so texts, with a line feed behind each `F`, are the stream byte for byte.
//!
//! Source: Kubernetes, «CRI container log format».

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::clock::rfc3339_nano;

/// Most bytes of text in one entry.
pub const MAX_ENTRY_BYTES: usize = 16 << 10;

/// Name of a stream in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// As in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// The log of one container. When it is full it becomes `<path>.1`, and the one that was that is gone.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    max_bytes: u64,
    file: Option<File>,
    inode: u64,
    size: u64,
    buffer: Vec<u8>,
    logged_bytes: u64,
    lost_bytes: u64,
    error: Option<String>,
}

impl LogFile {
    /// A log at `path` of at most `max_bytes` a file; two files at most. What lies there is truncated.
    pub fn create(path: PathBuf, max_bytes: u64) -> Self {
        let mut log = Self {
            path,
            max_bytes,
            file: None,
            inode: 0,
            size: 0,
            buffer: Vec::new(),
            logged_bytes: 0,
            lost_bytes: 0,
            error: None,
        };
        log.note(0, Self::open);
        log
    }

    /// Add what came on a stream. What can't be written is counted and the reason kept: the caller goes on reading.
    pub fn append(&mut self, stream: Stream, data: &[u8], unix_ns: u64) {
        let time = rfc3339_nano(unix_ns);
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        for line in data.split_inclusive(|byte| *byte == b'\n') {
            let (text, is_whole) = line.strip_suffix(b"\n").map_or((line, false), |text| (text, true));
            let mut pieces = text.chunks(MAX_ENTRY_BYTES).peekable();
            if pieces.peek().is_none() {
                push_entry(&mut buffer, &time, stream, is_whole, b"");
            }
            while let Some(piece) = pieces.next() {
                push_entry(&mut buffer, &time, stream, is_whole && pieces.peek().is_none(), piece);
            }
        }
        let bytes = data.len() as u64;
        if self.note(bytes, |log| log.write(&buffer)) {
            self.logged_bytes += bytes;
        }
        // A burst is not held for ever.
        if buffer.capacity() <= 4 * MAX_ENTRY_BYTES {
            self.buffer = buffer;
        }
    }

    /// The file that is written to now: inode and size. What a follower compares with.
    pub fn position(&self) -> (u64, u64) {
        (self.inode, self.size)
    }

    /// Bytes of output that were written, and that could not be.
    pub fn counts(&self) -> (u64, u64) {
        (self.logged_bytes, self.lost_bytes)
    }

    /// Why something could not be written; the last reason.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Remove both files. What is not there is fine.
    pub fn remove(&mut self) {
        self.file = None;
        for path in [self.path.clone(), older(&self.path)] {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                log::warn!("{} can't be removed: {error}", path.display());
            }
        }
    }

    fn note(&mut self, bytes: u64, step: impl FnOnce(&mut Self) -> io::Result<()>) -> bool {
        match step(self) {
            Ok(()) => true,
            Err(error) => {
                self.lost_bytes += bytes;
                let text = format!("{}: {error}", self.path.display());
                if self.error.as_ref() != Some(&text) {
                    log::warn!("output is lost: {text}");
                }
                self.error = Some(text);
                false
            }
        }
    }

    fn open(&mut self) -> io::Result<()> {
        self.file = None;
        let options = OpenOptions::new().append(true).create(true).mode(0o600).clone();
        let file = options.open(&self.path)?;
        file.set_len(0)?;
        self.inode = file.metadata()?.ino();
        self.size = 0;
        self.file = Some(file);
        Ok(())
    }

    fn write(&mut self, mut entries: &[u8]) -> io::Result<()> {
        while !entries.is_empty() {
            if self.file.is_none() {
                self.open()?;
            }
            let room = usize::try_from(self.max_bytes.saturating_sub(self.size)).unwrap_or(usize::MAX);
            let whole = whole_entries(entries, room);
            if whole == 0 && self.size > 0 {
                self.rotate()?;
                continue;
            }
            // An entry larger than a file is written all the same: a bound of the size of an entry is none.
            let step = if whole > 0 { whole } else { first_entry(entries) };
            self.write_here(&entries[..step])?;
            entries = &entries[step..];
        }
        Ok(())
    }

    fn write_here(&mut self, entries: &[u8]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Err(io::ErrorKind::NotConnected.into()) };
        if let Err(error) = file.write_all(entries) {
            // Half an entry would join the next one.
            if let Err(cut) = file.set_len(self.size) {
                log::debug!("{} can't be cut: {cut}", self.path.display());
            }
            return Err(error);
        }
        self.size += entries.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, older(&self.path))?;
        self.open()
    }
}

fn older(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".1");
    name.into()
}

fn first_entry(entries: &[u8]) -> usize {
    entries.iter().position(|byte| *byte == b'\n').map_or(entries.len(), |at| at + 1)
}

/// How many of the first `room` bytes are whole entries.
fn whole_entries(entries: &[u8], room: usize) -> usize {
    let seen = &entries[..room.min(entries.len())];
    seen.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1)
}

fn push_entry(buffer: &mut Vec<u8>, time: &str, stream: Stream, is_whole: bool, text: &[u8]) {
    buffer.extend_from_slice(time.as_bytes());
    buffer.push(b' ');
    buffer.extend_from_slice(stream.name().as_bytes());
    buffer.extend_from_slice(if is_whole { b" F " } else { b" P " });
    buffer.extend_from_slice(text);
    buffer.push(b'\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    const TIME_NS: u64 = 1_795_566_807_000_000_001;

    /// The bytes of one stream as a reader of the format puts them together.
    fn read_back(path: &Path, stream: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in fs::read(path).unwrap_or_default().split_inclusive(|byte| *byte == b'\n') {
            let mut fields = line.splitn(4, |byte| *byte == b' ');
            let (_, name, tag) = (fields.next(), fields.next().unwrap(), fields.next().unwrap());
            let text = fields.next().unwrap();
            if name == stream.as_bytes() {
                bytes.extend_from_slice(if tag == b"F" { text } else { text.strip_suffix(b"\n").unwrap() });
            }
        }
        bytes
    }

    #[test]
    fn append_when_lines_and_parts_come_then_entries_are_those_of_the_format() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.log");
        let mut log = LogFile::create(path.clone(), 1 << 20);
        log.append(Stream::Stdout, b"one\n\ntwo: ", TIME_NS);
        log.append(Stream::Stderr, b"oops\n", TIME_NS);
        let time = "2026-11-25T00:33:27.000000001Z";
        let wanted =
            format!("{time} stdout F one\n{time} stdout F \n{time} stdout P two: \n{time} stderr F oops\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), wanted);
        assert_eq!((log.counts(), log.position().1), ((15, 0), wanted.len() as u64));
    }

    #[test]
    fn append_when_it_is_full_then_two_files_hold_the_last_and_no_entry_is_torn() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.log");
        let mut log = LogFile::create(path.clone(), 4096);
        let all: Vec<u8> = (0..2000).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
        for piece in all.chunks(777) {
            log.append(Stream::Stdout, piece, TIME_NS);
        }
        let kept = [read_back(&older(&path), "stdout"), read_back(&path, "stdout")].concat();
        assert!(kept.len() > 1000 && all.ends_with(&kept));
        for file in [&path, &older(&path)] {
            assert!(fs::metadata(file).unwrap().len() <= 4096);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn append_when_the_disk_takes_no_more_then_it_is_counted_and_later_output_is_written() {
        // A device that is always full takes the place of the log.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.log");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut log = LogFile {
            file: Some(File::options().append(true).open(&path).unwrap()),
            ..LogFile::create(directory.path().join("d.log"), 1 << 20)
        };
        log.path = path.clone();
        log.append(Stream::Stdout, b"lost\n", TIME_NS);
        assert_eq!(log.counts(), (0, 5));
        assert!(log.error().unwrap().contains("No space left"), "{:?}", log.error());
        fs::remove_file(&path).unwrap();
        log.file = None;
        log.append(Stream::Stdout, b"kept\n", TIME_NS);
        assert_eq!((log.counts(), read_back(&path, "stdout")), ((5, 5), b"kept\n".to_vec()));
    }

    #[test]
    fn append_when_the_directory_is_gone_then_nothing_panics_and_all_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = LogFile::create(directory.path().join("no/c.log"), 1 << 20);
        log.append(Stream::Stdout, b"12345", TIME_NS);
        assert_eq!(log.counts(), (0, 5));
        log.remove();
    }

    #[test]
    fn remove_when_rotated_then_both_files_are_gone() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = LogFile::create(directory.path().join("c.log"), 64);
        log.append(Stream::Stdout, b"one\ntwo\nthree\n", TIME_NS);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        log.remove();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn append_when_any_bytes_come_in_any_pieces_then_the_stream_reads_back(
            pieces in prop::collection::vec(prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200), 0..20)
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("c.log");
            let mut log = LogFile::create(path.clone(), u64::MAX);
            for piece in &pieces {
                log.append(Stream::Stderr, piece, TIME_NS);
            }
            prop_assert_eq!(read_back(&path, "stderr"), pieces.concat());
        }
    }

    #[test]
    fn append_when_a_line_is_long_then_entries_are_bounded_and_it_reads_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.log");
        let mut log = LogFile::create(path.clone(), u64::MAX);
        let mut line = vec![b'x'; 3 * MAX_ENTRY_BYTES];
        line.push(b'\n');
        log.append(Stream::Stdout, &line, TIME_NS);
        assert_eq!(read_back(&path, "stdout"), line);
        let longest = fs::read(&path).unwrap().split(|byte| *byte == b'\n').map(<[u8]>::len).max();
        assert!(longest.unwrap() <= MAX_ENTRY_BYTES + 64);
    }
}
