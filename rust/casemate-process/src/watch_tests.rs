#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::*;
use crate::error::Step;
use crate::tail::TAIL_BYTES;

const LIMIT: Duration = Duration::from_secs(20);

fn request(argv: &[&str]) -> SpawnRequest {
    SpawnRequest {
        argv: argv.iter().map(Into::into).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        cwd: None,
        fds: Vec::new(),
        console: None,
    }
}

fn shell(script: &str) -> SpawnRequest {
    request(&["sh", "-c", script])
}

/// Runs a script and returns what it wrote to stderr.
fn stderr_of(script: &str) -> String {
    let child = spawn(shell(script)).unwrap();
    child.wait(LIMIT).unwrap();
    String::from_utf8(child.stderr_tail()).unwrap()
}

#[test]
fn wait_when_it_exits_or_is_killed_then_status_is_the_code_or_minus_the_signal() {
    let child = spawn(shell("exit 7")).unwrap();
    assert_eq!(child.wait(LIMIT), Ok(7));
    assert_eq!((child.exit_status(), child.send_signal(9)), (Some(7), Ok(false)));
    let child = spawn(request(&["sleep", "60"])).unwrap();
    assert_eq!(child.exit_status(), None);
    let error = ProcessError::DeadlineExceeded { pid: child.pid(), timeout: Duration::from_millis(10) };
    assert_eq!(child.wait(Duration::from_millis(10)), Err(error));
    assert_eq!(child.send_signal(libc::SIGTERM), Ok(true));
    assert_eq!(child.wait(LIMIT), Ok(-libc::SIGTERM));
}

#[test]
fn spawn_when_the_program_is_missing_or_no_program_then_the_error_has_step_and_errno() {
    for (name, errno) in
        [("/no/such/program", Errno::ENOENT), ("no-such-program", Errno::ENOENT), ("/etc", Errno::EACCES)]
    {
        let error = spawn(request(&[name])).unwrap_err();
        assert_eq!(error, ProcessError::Spawn { program: name.into(), step: Step::Execute, errno });
    }
    let mut elsewhere = request(&["true"]);
    elsewhere.cwd = Some("/no/such/directory".into());
    let error = spawn(elsewhere).unwrap_err();
    assert!(
        matches!(error, ProcessError::Spawn { step: Step::Directory, errno: Errno::ENOENT, .. }),
        "{error:?}"
    );
}

#[test]
fn spawn_when_the_request_makes_no_sense_then_invalid() {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let with_fds = |fds| SpawnRequest { fds, ..request(&["true"]) };
    let bad = [
        request(&[]),
        request(&[""]),
        request(&["tr\0ue"]),
        SpawnRequest { env: vec![("a=b".into(), "".into())], ..request(&["true"]) },
        with_fds(vec![(null(), -1)]),
        with_fds(vec![(null(), 5), (null(), 5)]),
    ];
    for request in bad {
        let error = spawn(request).unwrap_err();
        assert!(matches!(error, ProcessError::Invalid { .. }), "{error:?}");
    }
}

#[test]
fn spawn_when_fds_are_given_then_the_child_has_them_at_their_numbers_and_no_others() {
    let pairs: Vec<(UnixStream, UnixStream)> = (0..2).map(|_| UnixStream::pair().unwrap()).collect();
    // Made inheritable on purpose: the child must not get it all the same.
    let leaked = File::open("/dev/null").unwrap();
    fcntl_clear_cloexec(&leaked);
    // Crossed: each source's number may be the other's target.
    let sources: Vec<OwnedFd> = pairs.iter().map(|(_, theirs)| theirs.try_clone().unwrap().into()).collect();
    let targets: Vec<i32> = vec![sources[1].as_raw_fd(), sources[0].as_raw_fd()];
    let fds = sources.into_iter().zip(targets.iter().copied()).collect();
    let script =
        "printf a >&$1; printf b >&$2; ls /proc/self/fd >&2; readlink /proc/$$/fd/0 /proc/$$/fd/1 >&2";
    let argv = ["bash", "-c", script, "bash", &targets[0].to_string(), &targets[1].to_string()];
    let child = spawn(SpawnRequest { fds, ..request(&argv) }).unwrap();
    assert_eq!(child.wait(LIMIT), Ok(0));
    for ((mut ours, theirs), byte) in pairs.into_iter().zip([b'a', b'b']) {
        drop(theirs);
        let mut received = Vec::new();
        ours.read_to_end(&mut received).unwrap();
        assert_eq!(received, [byte]);
    }
    let stderr = String::from_utf8(child.stderr_tail()).unwrap();
    let mut numbers: Vec<i32> = stderr.lines().filter_map(|line| line.parse().ok()).collect();
    // ls itself has the directory open, at the lowest free number.
    numbers.retain(|number| ![0, 1, 2].contains(number) && !targets.contains(number));
    assert_eq!(numbers.len(), 1, "{stderr}");
    assert_eq!(stderr.matches("/dev/null").count(), 2, "{stderr}");
}

fn fcntl_clear_cloexec(file: &File) {
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
}

#[test]
fn spawn_when_started_then_in_its_own_session_with_default_signals() {
    let child =
        spawn(shell("cat /proc/self/status >&2; cut -d' ' -f6 /proc/$$/stat >&2; echo $$ >&2")).unwrap();
    child.wait(LIMIT).unwrap();
    let text = String::from_utf8(child.stderr_tail()).unwrap();
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).unwrap();
    assert_eq!((field("SigBlk:"), field("SigIgn:")), ("0000000000000000", "0000000000000000"));
    let last: Vec<&str> = text.lines().rev().take(2).collect();
    assert_eq!(last, [child.pid().to_string(), child.pid().to_string()]);
}

#[test]
fn spawn_when_environment_and_directory_are_given_then_the_child_has_exactly_them() {
    let request = SpawnRequest {
        env: vec![("ONE".into(), "1 =".into())],
        cwd: Some("/usr".into()),
        ..request(&["/bin/sh", "-c", "/usr/bin/env >&2"])
    };
    let child = spawn(request).unwrap();
    child.wait(LIMIT).unwrap();
    let text = String::from_utf8(child.stderr_tail()).unwrap();
    assert!(text.contains("ONE=1 =\n") && text.contains("PWD=/usr\n") && !text.contains("HOME="), "{text}");
}

#[test]
fn stderr_tail_when_much_is_written_then_bounded_and_the_last_bytes_are_there() {
    let child = spawn(shell("head -c 3000000 /dev/zero >&2; printf end >&2")).unwrap();
    assert_eq!(child.wait(LIMIT), Ok(0));
    let tail = child.stderr_tail();
    assert_eq!(tail.len(), TAIL_BYTES);
    assert!(tail.ends_with(b"\0\0end"));
}

#[test]
fn wait_when_a_grandchild_holds_stderr_then_ends_with_the_child() {
    let started = std::time::Instant::now();
    assert_eq!(stderr_of("sleep 20 & echo here >&2; echo $! >/dev/null; kill $! ; exec true"), "here\n");
    let child = spawn(shell("sleep 5 & echo x >&2")).unwrap();
    assert_eq!(child.wait(LIMIT), Ok(0));
    assert_eq!(child.stderr_tail(), b"x\n");
    assert!(started.elapsed() < Duration::from_secs(4));
}

#[test]
fn console_tail_when_a_console_is_given_then_read_until_it_ends() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let child = spawn(SpawnRequest { console: Some(theirs.into()), ..request(&["sleep", "60"]) }).unwrap();
    ours.write_all(b"boot").unwrap();
    let until = std::time::Instant::now() + LIMIT;
    while child.console_tail() != b"boot" {
        assert!(std::time::Instant::now() < until);
        std::thread::yield_now();
    }
    ours.write_all(&vec![b'x'; 3 * TAIL_BYTES]).unwrap();
    ours.write_all(b"panic").unwrap();
    child.send_signal(libc::SIGKILL).unwrap();
    child.wait(LIMIT).unwrap();
    assert!(child.console_tail().ends_with(b"xpanic") && child.console_tail().len() == TAIL_BYTES);
}

#[test]
fn spawn_when_the_calling_thread_ends_then_the_child_lives_on() {
    let child = std::thread::spawn(|| spawn(request(&["sleep", "60"])).unwrap()).join().unwrap();
    assert!(child.wait(Duration::from_millis(100)).is_err());
    child.send_signal(libc::SIGKILL).unwrap();
    assert_eq!(child.wait(LIMIT), Ok(-libc::SIGKILL));
}

#[test]
fn child_when_dropped_then_reaped_all_the_same() {
    let child = spawn(request(&["true"])).unwrap();
    let pid = child.pid();
    assert!(child.start_time_ticks() > 0);
    drop(child);
    let until = std::time::Instant::now() + LIMIT;
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(std::time::Instant::now() < until, "{pid} is still there");
        std::thread::yield_now();
    }
}

#[test]
fn spawn_when_many_threads_start_children_then_each_gets_its_own() {
    let threads: Vec<_> = (0..8)
        .map(|number| {
            std::thread::spawn(move || {
                for _ in 0..5 {
                    assert_eq!(spawn(shell(&format!("exit {number}"))).unwrap().wait(LIMIT), Ok(number));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
