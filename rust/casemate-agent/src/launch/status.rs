//! The talk between the agent and a child that is on its way to its program.

use std::borrow::Cow;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use prost::Message;

use crate::error::{AgentError, Result};
use crate::launch::Plan;

/// Most bytes of an error text.
const MAX_TEXT_BYTES: usize = 4096;
const READY: u8 = b'R';
const FAILED: u8 = b'E';

/// A step of a child that failed.
#[derive(Debug, PartialEq, Eq)]
pub struct StepError {
    /// What was tried; `exec` for the program itself.
    pub step: Cow<'static, str>,
    /// On what.
    pub target: String,
    /// Why not.
    pub errno: Errno,
}

impl StepError {
    /// A step failed with `errno`.
    pub fn new(step: impl Into<Cow<'static, str>>, target: impl Into<String>, errno: Errno) -> Self {
        Self { step: step.into(), target: target.into(), errno }
    }
}

/// Adds step and target to a failed system call of a child.
pub trait Step<T> {
    /// Turn the failure into a [`StepError`].
    fn step(self, step: &'static str, target: impl AsRef<str>) -> std::result::Result<T, StepError>;
}

impl<T> Step<T> for nix::Result<T> {
    fn step(self, step: &'static str, target: impl AsRef<str>) -> std::result::Result<T, StepError> {
        self.map_err(|errno| StepError::new(step, target.as_ref(), errno))
    }
}

impl<T> Step<T> for std::io::Result<T> {
    fn step(self, step: &'static str, target: impl AsRef<str>) -> std::result::Result<T, StepError> {
        let errno = |error: &std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        self.map_err(|error| StepError::new(step, target.as_ref(), errno(&error)))
    }
}

/// The child's end.
#[derive(Debug)]
pub struct ChildEnd(UnixStream);

impl ChildEnd {
    /// Take the descriptor.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Read what this child shall become. None: the agent gave up.
    pub fn read_plan(&mut self) -> Option<Plan> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).ok()?;
        let mut bytes = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut bytes).ok()?;
        Plan::decode(&bytes[..]).ok()
    }

    /// Say that everything but the program is in place, handing over the terminal. False: the agent gave up.
    pub fn send_ready(&self, terminal: Option<&OwnedFd>) -> bool {
        let fds: Vec<RawFd> = terminal.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&[READY])], rights, MsgFlags::MSG_NOSIGNAL, None)
            .is_ok()
    }

    /// Wait for the word to start. False: the agent gave up.
    pub fn wait_for_start(&mut self) -> bool {
        self.0.read_exact(&mut [0]).is_ok()
    }

    /// Report a failure. When the agent is not there any more, nobody wants to know.
    pub fn send_error(&mut self, error: &StepError) {
        let mut message = vec![FAILED];
        message.extend((error.errno as i32).to_be_bytes());
        message.extend(error.step.bytes());
        message.push(0);
        message.extend(error.target.bytes().take(MAX_TEXT_BYTES / 2));
        drop(self.0.write_all(&message));
    }
}

/// The agent's end.
#[derive(Debug)]
pub struct AgentEnd(UnixStream);

/// What a child has said.
enum Said {
    Ready(Option<OwnedFd>),
    Ended,
}

impl AgentEnd {
    /// A connected pair.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|error| AgentError::io("socketpair", "status of a new process", &error))?;
        Ok((Self(ours), theirs.into()))
    }

    /// Send the plan.
    pub fn send_plan(&mut self, plan: &Plan, at_most: Duration) -> Result<()> {
        let bytes = plan.encode_to_vec();
        let length = u32::try_from(bytes.len()).map_err(|_| AgentError::invalid("OCI", "too large"))?;
        self.set_timeout(at_most)?;
        let sent = self.0.write_all(&length.to_be_bytes()).and_then(|()| self.0.write_all(&bytes));
        match sent {
            Ok(()) => Ok(()),
            // It may have failed early and said why.
            Err(_) => match self.receive(at_most)? {
                Said::Ready(_) | Said::Ended => Err(AgentError::ChildGone { context: "plan" }),
            },
        }
    }

    /// Wait until the child is ready; its terminal when it has one.
    pub fn wait_ready(&mut self, at_most: Duration) -> Result<Option<OwnedFd>> {
        match self.receive(at_most)? {
            Said::Ready(terminal) => Ok(terminal),
            Said::Ended => Err(AgentError::ChildGone { context: "set-up" }),
        }
    }

    /// Let the child execute its program and wait until it has.
    pub fn start(&mut self, at_most: Duration) -> Result<()> {
        self.0.write_all(&[1]).map_err(|_| AgentError::ChildGone { context: "start" })?;
        self.wait_end(at_most)
    }

    /// Wait until the child has executed its program.
    pub fn wait_end(&mut self, at_most: Duration) -> Result<()> {
        match self.receive(at_most)? {
            Said::Ended => Ok(()),
            Said::Ready(_) => Err(AgentError::ChildGone { context: "start" }),
        }
    }

    fn set_timeout(&self, at_most: Duration) -> Result<()> {
        let set =
            self.0.set_write_timeout(Some(at_most)).and_then(|()| self.0.set_read_timeout(Some(at_most)));
        set.map_err(|error| AgentError::io("set timeout of", "status socket", &error))
    }

    fn receive(&mut self, at_most: Duration) -> Result<Said> {
        let started = Instant::now();
        self.set_timeout(at_most)?;
        let mut kind = [0];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let (bytes, terminal) = loop {
            let mut parts = [IoSliceMut::new(&mut kind)];
            let fd = self.0.as_fd().as_raw_fd();
            match recvmsg::<()>(fd, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(message) => break (message.bytes, first_fd(message.cmsgs()?)),
                Err(Errno::EINTR) => {}
                // A child that was killed leaves the plan unread, which resets the connection.
                Err(Errno::ECONNRESET) => break (0, None),
                Err(Errno::EAGAIN) => {
                    let after_ms = started.elapsed().as_millis();
                    return Err(AgentError::TimedOut { what: "a new process".to_owned(), after_ms });
                }
                Err(errno) => return Err(AgentError::system("receive from", "a new process", errno)),
            }
        };
        match (bytes, kind[0]) {
            (0, _) => Ok(Said::Ended),
            (_, READY) => Ok(Said::Ready(terminal)),
            _ => Err(self.receive_error()),
        }
    }

    fn receive_error(&mut self) -> AgentError {
        let mut bytes = Vec::new();
        let at_most = u64::try_from(MAX_TEXT_BYTES).unwrap_or(u64::MAX);
        // What has come by the end or the timeout is the message.
        drop(Read::by_ref(&mut self.0).take(at_most).read_to_end(&mut bytes));
        let Some((errno, text)) = bytes.split_first_chunk::<4>() else {
            return AgentError::ChildGone { context: "error" };
        };
        let text = String::from_utf8_lossy(text);
        let (step, target) = text.split_once('\0').unwrap_or((&text, ""));
        AgentError::system(step.to_owned(), target, Errno::from_raw(i32::from_be_bytes(*errno)))
    }
}

impl From<Errno> for AgentError {
    fn from(errno: Errno) -> Self {
        Self::system("receive from", "a child", errno)
    }
}

fn first_fd(messages: impl Iterator<Item = ControlMessageOwned>) -> Option<OwnedFd> {
    let mut first = None;
    for message in messages {
        if let ControlMessageOwned::ScmRights(fds) = message {
            for fd in fds {
                // SAFETY: the kernel made this descriptor for us in this very receive; nobody else knows it.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                first.get_or_insert(fd);
            }
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn pair() -> (AgentEnd, ChildEnd) {
        let (ours, theirs) = AgentEnd::pair().expect("a pair");
        (ours, ChildEnd::new(theirs))
    }

    #[test]
    fn test_talk_when_all_goes_well_then_plan_ready_and_end() {
        let (mut agent, mut child) = pair();
        let plan = Plan { is_exec: true, ..Default::default() };
        agent.send_plan(&plan, SOON).expect("sent");
        assert_eq!(child.read_plan(), Some(plan));
        let (terminal, _other) = UnixStream::pair().expect("a pair");
        assert!(child.send_ready(Some(&terminal.into())));
        assert!(agent.wait_ready(SOON).expect("ready").is_some());
        let child = std::thread::spawn(move || child.wait_for_start());
        agent.start(SOON).expect("started");
        assert!(child.join().expect("no panic"));
    }

    #[test]
    fn test_wait_ready_when_child_fails_then_text_ends_in_errno() {
        let (mut agent, mut child) = pair();
        child.send_error(&StepError::new("exec", "/nope", Errno::ENOENT));
        drop(child);
        let error = agent.wait_ready(SOON).expect_err("failed");
        assert_eq!(error.to_string(), "exec /nope: ENOENT: No such file or directory");
    }

    #[test]
    fn test_wait_ready_when_child_says_nothing_then_gone_or_timed_out() {
        let (mut agent, child) = pair();
        assert!(matches!(agent.wait_ready(Duration::from_millis(5)), Err(AgentError::TimedOut { .. })));
        drop(child);
        assert!(matches!(agent.wait_ready(SOON), Err(AgentError::ChildGone { .. })));
    }
}
