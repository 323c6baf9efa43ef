//! Hybrid sockets: a VMM's (or vhost-user backend's) unix socket that leads to the guest's vsock ports.
//!
//! Source: Firecracker, `docs/vsock.md`, «host-initiated connections»: `CONNECT <port>\n` is answered by `OK <n>\n`, or the
//! connection is closed when nobody listens in the guest.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};

use crate::error::VsockError;
use crate::kernel::{Port, make_blocking};
use crate::patience::{Attempt, Patience, Ready};

/// Longest answer line; the longest proper one is `OK 4294967295\n`.
const MAX_LINE_BYTES: usize = 32;

/// Longest that one greeting may take before the connection is made anew.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// Connects to `port` of the guest behind the unix socket `path`, trying again while it refuses. Blocks.
///
/// # Errors
/// [`VsockError`]. A path that can't be an address of a unix socket is [`VsockError::Io`].
pub fn connect_hybrid(path: &Path, port: Port, patience: Patience<'_>) -> Result<OwnedFd, VsockError> {
    let mut attempt = Attempt::new(patience, format!("hvsock://{}:{port}", path.display()));
    let address = UnixAddr::new(path).map_err(|errno| attempt.io("connect", errno))?;
    loop {
        match connect_once(&attempt, &address, port)? {
            Ok(socket) => return Ok(socket),
            Err(why) => attempt.pause(why)?,
        }
    }
}

/// One try; the inner error says why another may succeed.
fn connect_once(
    attempt: &Attempt<'_>,
    address: &UnixAddr,
    port: Port,
) -> Result<Result<OwnedFd, String>, VsockError> {
    casemate_failpoint::hit("native.connect")?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .map_err(|errno| attempt.io("socket", errno))?;
    match connect(socket.as_raw_fd(), address) {
        Ok(()) => {}
        // Not there yet, nobody accepts yet, or its queue is full.
        Err(errno @ (Errno::ENOENT | Errno::ECONNREFUSED | Errno::EAGAIN | Errno::EINTR)) => {
            return Ok(Err(errno.desc().into()));
        }
        Err(errno) => return Err(attempt.io("connect", errno)),
    }
    let greeting = format!("CONNECT {port}\n");
    match send(socket.as_raw_fd(), greeting.as_bytes(), MsgFlags::MSG_NOSIGNAL) {
        Ok(sent) if sent == greeting.len() => {}
        Ok(_) => return Ok(Err("the greeting was not taken whole".into())),
        Err(errno) => return Ok(Err(errno.desc().into())),
    }
    Ok(match read_line(attempt, &socket)? {
        Ok(line) if is_ok(&line) => {
            make_blocking(attempt, &socket)?;
            Ok(socket)
        }
        Ok(line) => Err(format!("malformed response {:?}", String::from_utf8_lossy(&line))),
        Err(why) => Err(why),
    })
}

fn is_ok(line: &[u8]) -> bool {
    line.strip_prefix(b"OK ")
        .is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

/// Reads one line and nothing behind it: the guest may speak first.
fn read_line(attempt: &Attempt<'_>, socket: &OwnedFd) -> Result<Result<Vec<u8>, String>, VsockError> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match recv(socket.as_raw_fd(), &mut byte, MsgFlags::empty()) {
            Ok(0) => return Ok(Err("closed before it answered".into())),
            Ok(_) if byte == [b'\n'] => return Ok(Ok(line)),
            Ok(_) if line.len() == MAX_LINE_BYTES => {
                return Ok(Err(format!("malformed response {:?}", String::from_utf8_lossy(&line))));
            }
            Ok(_) => line.extend_from_slice(&byte),
            Err(Errno::EAGAIN) => {
                let interest = (socket.as_fd(), PollFlags::POLLIN);
                if attempt.wait(Some(interest), Some(GREETING_LIMIT))? == Ready::NotYet {
                    return Ok(Err("no answer to the greeting".into()));
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Ok(Err(errno.desc().into())),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;
    use std::time::Instant;

    use super::*;

    fn patience(timeout_ms: u64) -> Patience<'static> {
        Patience { timeout: Duration::from_millis(timeout_ms), watch: None, is_interrupted: &|| false }
    }

    /// Serves one connection for each answer, in order, and returns the greetings.
    fn serve(path: &Path, answers: &'static [&'static [u8]]) -> thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let serve_one = |answer: &&[u8]| {
                let (mut socket, _) = listener.accept().unwrap();
                let mut greeting = String::new();
                BufReader::new(&socket).read_line(&mut greeting).unwrap();
                // The peer may have had enough before all is written.
                let _ = socket.write_all(answer);
                greeting
            };
            answers.iter().map(serve_one).collect()
        })
    }

    #[test]
    fn connect_when_answered_ok_then_connected_and_nothing_behind_the_line_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let server = serve(&path, &[b"OK 1073741824\nfirst"]);
        let socket = connect_hybrid(&path, Port(1024), patience(5000)).unwrap();
        let mut text = String::new();
        UnixStream::from(socket).read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), server.join().unwrap()), ("first", vec!["CONNECT 1024\n".to_string()]));
    }

    #[test]
    fn connect_when_refused_or_malformed_then_tried_again_until_it_is_ok() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let server = serve(&path, &[b"", b"NO\n", b"OK\n", b"OK x1\n", &[b'a'; 200], b"OK 5\n"]);
        connect_hybrid(&path, Port(7), patience(5000)).unwrap();
        assert_eq!(server.join().unwrap().len(), 6);
    }

    #[test]
    fn connect_when_the_socket_comes_later_then_connected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let later = path.clone();
        let connecting = thread::spawn(move || connect_hybrid(&later, Port(7), patience(10_000)));
        let server = serve(&path, &[b"OK 5\n"]);
        connecting.join().unwrap().unwrap();
        server.join().unwrap();
    }

    #[test]
    fn connect_when_two_sandboxes_use_two_ports_then_each_has_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("1"), directory.path().join("2"));
        let servers = [serve(&one, &[b"OK 5\n"]), serve(&two, &[b"OK 5\n"])];
        connect_hybrid(&one, Port(1024), patience(5000)).unwrap();
        connect_hybrid(&two, Port(2048), patience(5000)).unwrap();
        let greetings = servers.map(|server| server.join().unwrap().concat());
        assert_eq!(greetings, ["CONNECT 1024\n", "CONNECT 2048\n"]);
    }

    #[test]
    fn connect_when_it_never_works_then_deadline_exceeded_with_the_last_reason() {
        let directory = tempfile::tempdir().unwrap();
        let started = Instant::now();
        let error = connect_hybrid(&directory.path().join("none"), Port(7), patience(40)).unwrap_err();
        let VsockError::DeadlineExceeded { last: Some(last), .. } = &error else { panic!("{error:?}") };
        assert_eq!(last, Errno::ENOENT.desc());
        assert!(started.elapsed() >= Duration::from_millis(40));
    }

    #[test]
    fn connect_when_the_answer_does_not_come_then_ends_with_the_deadline_or_the_watched_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _silent = UnixListener::bind(&path).unwrap();
        let error = connect_hybrid(&path, Port(7), patience(40)).unwrap_err();
        assert!(matches!(error, VsockError::DeadlineExceeded { .. }), "{error:?}");
        let (watch, process) = UnixStream::pair().unwrap();
        drop(process);
        let watched = Patience { watch: Some(watch.as_fd()), ..patience(20_000) };
        let error = connect_hybrid(&path, Port(7), watched).unwrap_err();
        assert!(matches!(error, VsockError::WatchEnded { .. }), "{error:?}");
    }

    #[test]
    fn connect_when_the_path_can_not_be_a_socket_then_told_at_once() {
        let long = "x".repeat(200);
        let error = connect_hybrid(Path::new(&long), Port(7), patience(20_000)).unwrap_err();
        assert!(matches!(error, VsockError::Io { errno: Errno::ENAMETOOLONG, .. }), "{error:?}");
    }
}
