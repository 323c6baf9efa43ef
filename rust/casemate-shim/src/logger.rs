//! The keeper's own log: a file of a bounded size, and one older.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use log::{LevelFilter, Log, Metadata, Record};

use crate::clock::unix_ns;
use crate::log_file::{LogFile, Stream};

struct Logger {
    file: Mutex<LogFile>,
}

/// Send what the crates log to `path`, at most twice `max_bytes`. Once a process; a second call changes nothing.
pub fn log_to(path: PathBuf, max_bytes: u64) {
    let logger = Box::leak(Box::new(Logger { file: Mutex::new(LogFile::create(path, max_bytes)) }));
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        // A log that can't be written warns of itself: this would wait for itself then.
        if !self.enabled(record.metadata())
            || record.target().ends_with("log_file") && self.file.try_lock().is_err()
        {
            return;
        }
        let mut line = String::new();
        if writeln!(line, "{} {}", record.level(), record.args()).is_ok() {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.append(Stream::Stderr, line.as_bytes(), unix_ns());
        }
    }

    fn flush(&self) {}
}
