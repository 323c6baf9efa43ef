//! `casemate-keeper --directory DIR --control-fd N [--log-bytes N]`: keeps one sandbox. Started by casemate, not by people.

use std::io::Write as _;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use casemate_shim::{Keeper, Limits, detach, log_to};

const USAGE: &str =
    "usage: casemate-keeper --directory DIR --control-fd N [--log-bytes N]; `casemate create` starts it";

struct Options {
    directory: PathBuf,
    control_fd: i32,
    limits: Limits,
}

fn options() -> Option<Options> {
    let (mut directory, mut control_fd, mut limits) = (None, None, Limits::default());
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        let value = words.next()?;
        match word.to_str()? {
            "--directory" => directory = Some(PathBuf::from(value)),
            "--control-fd" => control_fd = Some(value.to_str()?.parse().ok().filter(|number| *number > 2)?),
            "--log-bytes" => limits.log_bytes = value.to_str()?.parse().ok()?,
            _ => return None,
        }
    }
    Some(Options { directory: directory?, control_fd: control_fd?, limits })
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    // SAFETY: no pointers are passed.
    if unsafe { libc::fcntl(options.control_fd, libc::F_GETFD) } < 0 {
        eprintln!("descriptor {} is not open; {USAGE}", options.control_fd);
        return ExitCode::from(2);
    }
    if let Err(error) = detach() {
        eprintln!("the keeper can't leave its starter: {error}");
        return ExitCode::FAILURE;
    }
    // SAFETY: it is open, and whoever named it gave it to this process.
    let creator = unsafe { OwnedFd::from_raw_fd(options.control_fd) };
    // SAFETY: changes what files are made with; there is one thread.
    unsafe { libc::umask(0o077) };
    log_to(options.directory.join("keeper.log"), options.limits.own_log_bytes);
    let spare = creator.try_clone();
    match Keeper::new(&options.directory, creator, options.limits) {
        Ok(keeper) => {
            drop(spare);
            keeper.run();
            ExitCode::SUCCESS
        }
        Err(error) => {
            log::error!("{error}");
            if let Ok(spare) = spare {
                let mut creator = std::os::unix::net::UnixStream::from(spare);
                let document = serde_json::json!({ "error": { "kind": "host", "text": error.to_string(), "errno": null } });
                // One that is gone needs no answer.
                let _ = writeln!(creator, "{document}");
            }
            ExitCode::FAILURE
        }
    }
}
