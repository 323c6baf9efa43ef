//! A container whose output and end are kept.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::clock::unix_ns;
use crate::files::write_whole;
use crate::log_file::{LogFile, Stream};
use crate::record::{ExitCause, ExitRecord, VERSION};

/// How long output is waited for once the end is known: somebody else in the container may hold the streams.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Rest between two tries to write a record.
const WRITE_AGAIN: Duration = Duration::from_secs(5);

/// A request to the agent on behalf of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// The end of its first process.
    End,
    /// The next piece of a stream.
    Output(Stream),
}

/// How far it has come.
#[derive(Debug)]
enum Life {
    /// It may run.
    Open,
    /// Its end is known, output may still come until then.
    Draining { record: ExitRecord, until: Instant },
    /// All is known; the record waits for a disk that takes it.
    Unwritten { record: ExitRecord, again: Instant },
    /// All is known and on disk.
    Done { record: ExitRecord },
}

/// One container.
#[derive(Debug)]
pub struct Kept {
    id: String,
    record_path: PathBuf,
    log: LogFile,
    open_streams: Vec<Stream>,
    life: Life,
}

impl Kept {
    /// Start keeping; what an earlier one of the name left is replaced.
    pub fn new(directory: &Path, id: &str, terminal: bool, log_bytes: u64) -> Self {
        let mut kept = Self {
            id: id.to_owned(),
            record_path: directory.join("exits").join(format!("{id}.json")),
            log: LogFile::create(directory.join("logs").join(format!("{id}.log")), log_bytes),
            open_streams: if terminal { vec![Stream::Stdout] } else { vec![Stream::Stdout, Stream::Stderr] },
            life: Life::Open,
        };
        kept.remove_record();
        kept
    }

    /// What is to be asked of the agent on a new connection.
    pub fn wanted(&self) -> Vec<Wanted> {
        let end = matches!(self.life, Life::Open).then_some(Wanted::End);
        let outputs = self.open_streams.iter().map(|stream| Wanted::Output(*stream));
        match self.life {
            Life::Open | Life::Draining { .. } => end.into_iter().chain(outputs).collect(),
            Life::Unwritten { .. } | Life::Done { .. } => Vec::new(),
        }
    }

    /// A piece of a stream; whether the next one is wanted.
    pub fn on_output(&mut self, stream: Stream, data: &[u8]) -> bool {
        if !self.open_streams.contains(&stream)
            || matches!(self.life, Life::Unwritten { .. } | Life::Done { .. })
        {
            return false;
        }
        if data.is_empty() {
            self.on_stream_end(stream);
            return false;
        }
        self.log.append(stream, data, unix_ns());
        true
    }

    /// No more will come on a stream.
    pub fn on_stream_end(&mut self, stream: Stream) {
        self.open_streams.retain(|open| *open != stream);
    }

    /// Its first process has ended, or nobody knows it any more.
    pub fn on_end(&mut self, status: Option<i32>, cause: ExitCause, text: String) {
        if matches!(self.life, Life::Open) {
            let record = ExitRecord {
                version: VERSION,
                container_id: self.id.clone(),
                status,
                cause,
                text,
                ended_unix_ns: unix_ns(),
                logged_bytes: 0,
                lost_bytes: 0,
                log_error: None,
            };
            self.life = Life::Draining { record, until: Instant::now() + DRAIN_TIME };
        }
    }

    /// Nothing more will come at all.
    pub fn close(&mut self) {
        self.open_streams.clear();
    }

    /// Go on where time or the last answer allow it.
    pub fn turn(&mut self, now: Instant) {
        self.life = match std::mem::replace(&mut self.life, Life::Open) {
            Life::Draining { mut record, until } if self.open_streams.is_empty() || until <= now => {
                (record.logged_bytes, record.lost_bytes) = self.log.counts();
                record.log_error = self.log.error().map(str::to_owned);
                self.write(record, now)
            }
            Life::Unwritten { record, again } if again <= now => self.write(record, now),
            other => other,
        };
    }

    /// When [`Kept::turn`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        match self.life {
            Life::Draining { until, .. } => Some(until),
            Life::Unwritten { again, .. } => Some(again),
            Life::Open | Life::Done { .. } => None,
        }
    }

    /// Its end, once no more output will come.
    pub fn record(&self) -> Option<&ExitRecord> {
        match &self.life {
            Life::Done { record } | Life::Unwritten { record, .. } => Some(record),
            Life::Open | Life::Draining { .. } => None,
        }
    }

    /// Whether its record is not on disk although it is known.
    pub fn is_unwritten(&self) -> bool {
        matches!(self.life, Life::Unwritten { .. })
    }

    /// Its log.
    pub fn log(&self) -> &LogFile {
        &self.log
    }

    /// Remove log and record.
    pub fn remove(mut self) {
        self.log.remove();
        self.remove_record();
    }

    fn write(&self, record: ExitRecord, now: Instant) -> Life {
        let document = serde_json::to_vec(&record).unwrap_or_default();
        match write_whole(&self.record_path, &document) {
            Ok(()) => Life::Done { record },
            Err(error) => {
                log::warn!("{} can't be written: {error}", self.record_path.display());
                Life::Unwritten { record, again: now + WRITE_AGAIN }
            }
        }
    }

    fn remove_record(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.record_path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("{} can't be removed: {error}", self.record_path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("logs")).unwrap();
        fs::create_dir(directory.path().join("exits")).unwrap();
        directory
    }

    fn record_of(directory: &Path) -> serde_json::Value {
        serde_json::from_slice(&fs::read(directory.join("exits/one.json")).unwrap()).unwrap()
    }

    #[test]
    fn turn_when_it_ended_and_output_is_at_its_end_then_the_record_has_all_of_it() {
        let directory = directory();
        let mut kept = Kept::new(directory.path(), "one", false, 1 << 20);
        assert_eq!(
            kept.wanted(),
            [Wanted::End, Wanted::Output(Stream::Stdout), Wanted::Output(Stream::Stderr)]
        );
        assert!(kept.on_output(Stream::Stdout, b"hello\n"));
        kept.on_end(Some(3), ExitCause::Exited, "it exited with status 3".into());
        kept.turn(Instant::now());
        assert!(kept.record().is_none(), "output may still come");
        assert!(kept.on_output(Stream::Stderr, b"rest"));
        assert!(!kept.on_output(Stream::Stdout, b"") && !kept.on_output(Stream::Stderr, b""));
        kept.turn(Instant::now());
        let record = record_of(directory.path());
        assert_eq!((&record["status"], &record["logged_bytes"]), (&3.into(), &10.into()));
        assert_eq!((&record["cause"], kept.wanted().len()), (&"exited".into(), 0));
        kept.remove();
        assert!(fs::read_dir(directory.path().join("logs")).unwrap().next().is_none());
        assert!(fs::read_dir(directory.path().join("exits")).unwrap().next().is_none());
    }

    #[test]
    fn turn_when_somebody_holds_the_streams_then_the_record_comes_with_time() {
        let directory = directory();
        let mut kept = Kept::new(directory.path(), "one", true, 1 << 20);
        assert_eq!(kept.wanted(), [Wanted::End, Wanted::Output(Stream::Stdout)]);
        kept.on_end(Some(0), ExitCause::Exited, String::new());
        let due = kept.deadline().unwrap();
        kept.turn(due);
        assert_eq!(record_of(directory.path())["status"], 0);
        assert!(!kept.on_output(Stream::Stdout, b"late"));
    }

    #[test]
    fn turn_when_the_disk_does_not_take_the_record_then_it_is_known_and_written_later() {
        let directory = directory();
        let exits = directory.path().join("exits");
        let mut kept = Kept::new(directory.path(), "one", false, 1 << 20);
        fs::remove_dir(&exits).unwrap();
        kept.on_end(None, ExitCause::VmmEnded, String::new());
        kept.close();
        kept.turn(Instant::now());
        assert!(kept.is_unwritten() && kept.record().is_some());
        fs::create_dir(&exits).unwrap();
        let due = kept.deadline().unwrap();
        kept.turn(due);
        assert!(!kept.is_unwritten());
        assert_eq!(record_of(directory.path())["cause"], "vmm_ended");
    }

    #[test]
    fn on_end_when_told_twice_then_the_first_counts() {
        let directory = directory();
        let mut kept = Kept::new(directory.path(), "one", false, 1 << 20);
        kept.on_end(Some(7), ExitCause::Exited, String::new());
        kept.on_end(None, ExitCause::VmmEnded, String::new());
        kept.close();
        kept.turn(Instant::now());
        assert_eq!(record_of(directory.path())["status"], 7);
    }
}
