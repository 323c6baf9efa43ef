//! Log lines on standard error: the guest's console.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

use crate::marks::boot_time_ns;

struct Console;

impl Log for Console {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let ms = boot_time_ns() / 1_000_000;
        let line =
            format!("casemate-agent {ms} ms {}: {}\n", record.level().as_str().to_lowercase(), record.args());
        // One write a line, so that lines of several threads do not mix. There is nowhere to say that it failed.
        drop(std::io::stderr().write_all(line.as_bytes()));
    }

    fn flush(&self) {}
}

/// Send lines of `level` and above to the console.
pub fn start(level: LevelFilter) {
    log::set_max_level(level);
    if log::set_logger(&Console).is_err() {
        log::debug!("the logger was set before");
    }
}
