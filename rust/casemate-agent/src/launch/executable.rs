//! Finding the program of a process, in the container and as its user.

use std::fs;
use std::path::Path;

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

use crate::launch::status::StepError;

/// The path to execute: the first argument if it has a slash, else what is found along PATH.
///
/// # Errors
/// Step `exec`: ENOENT when there is nothing, EACCES when it is there but no file that may be executed.
pub fn find(process: &grpc::Process, environment: &[String]) -> Result<String, StepError> {
    let Some(name) = process.args.first().filter(|name| !name.is_empty()) else {
        return Err(StepError::new("exec", "(no arguments)", Errno::EINVAL));
    };
    if name.contains('/') {
        return match check(name) {
            Ok(()) => Ok(name.clone()),
            Err(errno) => Err(StepError::new("exec", name, errno)),
        };
    }
    let path = environment.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let mut errno = Errno::ENOENT;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = format!("{}/{name}", directory.trim_end_matches('/'));
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => errno = Errno::EACCES,
            Err(_) => {}
        }
    }
    Err(StepError::new("exec", format!("{name} (PATH={path})"), errno))
}

fn check(path: &str) -> Result<(), Errno> {
    let metadata = fs::metadata(Path::new(path))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    if !metadata.is_file() {
        return Err(Errno::EACCES);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn process(name: &str) -> grpc::Process {
        grpc::Process { args: vec![name.into()], ..Default::default() }
    }

    #[test]
    fn test_find_when_on_path_then_first_executable_one() {
        let directory = tempfile::tempdir().expect("a directory");
        for (name, mode) in [("plain", 0o644), ("program", 0o755)] {
            let path = directory.path().join(name);
            fs::write(&path, "").expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
        }
        let environment = [format!("PATH=/nowhere:{}", directory.path().display())];
        let found = find(&process("program"), &environment).expect("found");
        assert_eq!(found, directory.path().join("program").display().to_string());
        let error = find(&process("plain"), &environment).expect_err("not executable");
        assert_eq!((error.step.as_ref(), error.errno), ("exec", Errno::EACCES));
        let error = find(&process("absent"), &environment).expect_err("absent");
        assert_eq!(error.errno, Errno::ENOENT);
    }

    #[test]
    fn test_find_when_a_path_is_given_then_taken_as_it_is() {
        assert_eq!(find(&process("/bin/sh"), &[]).expect("found"), "/bin/sh");
        assert_eq!(find(&process("/nope/sh"), &[]).expect_err("absent").errno, Errno::ENOENT);
        assert_eq!(find(&process("/bin"), &[]).expect_err("a directory").errno, Errno::EACCES);
        assert_eq!(find(&process(""), &[]).expect_err("nothing").errno, Errno::EINVAL);
    }
}
