//! The VMM and its vsock device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use casemate_process::{Child, SpawnRequest};
use casemate_vhost_vsock::VsockBackend;

use crate::clock::unix_ns;
use crate::control::SpawnMessage;
use crate::error::ShimError;
use crate::record::{EndRecord, VERSION, tail_text};

/// How long the rest of stderr and console is waited for once the process has ended.
const REST_TIME: Duration = Duration::from_secs(2);

/// A VMM that was started here: it ends with this process.
#[derive(Debug)]
pub struct Vmm {
    child: Arc<Child>,
    vsock: Option<VsockBackend>,
}

impl Vmm {
    /// Serve the device, then start the program.
    pub fn start(message: SpawnMessage, fds: Vec<OwnedFd>) -> Result<Self, ShimError> {
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(|| ShimError::invalid("a descriptor is missing"));
        let numbers = message.fds.iter().map(|number| Ok((next()?, *number)));
        let placed = numbers.collect::<Result<Vec<_>, ShimError>>()?;
        let console = message.console.then(&mut next).transpose()?;
        let vsock = message
            .vsock
            .map(|wanted| {
                VsockBackend::start(next()?, Path::new(&wanted.path.0), wanted.cid).map_err(ShimError::Vsock)
            })
            .transpose()?;
        let request = SpawnRequest {
            argv: message.argv.into_iter().map(|word| word.0).collect(),
            env: message.env.into_iter().map(|(key, value)| (key.0, value.0)).collect(),
            cwd: message.cwd.map(|path| path.0),
            fds: placed,
            console,
        };
        match casemate_process::spawn(request) {
            Ok(child) => Ok(Self { child, vsock }),
            Err(error) => {
                close(vsock.as_ref());
                Err(error.into())
            }
        }
    }

    /// Process id and start time.
    pub fn id(&self) -> (i32, u64) {
        (self.child.pid(), self.child.start_time_ticks())
    }

    /// Why the vsock device is not served any more.
    pub fn vsock_error(&self) -> Option<String> {
        self.vsock.as_ref().and_then(VsockBackend::error)
    }

    /// The last of stderr and of the console.
    pub fn tails(&self) -> (String, String) {
        (tail_text(&self.child.stderr_tail()), tail_text(&self.child.console_tail()))
    }

    /// End it at once; its pidfd tells when.
    pub fn kill(&self) {
        if let Err(error) = self.child.send_signal(libc::SIGKILL) {
            log::error!("the VMM can't be ended: {error}");
        }
    }

    /// What is to be told of its end. Waits a moment for the rest of its output.
    pub fn end_record(&self, wanted: bool) -> EndRecord {
        let status = self.child.wait(REST_TIME).ok().or_else(|| self.child.exit_status());
        let (stderr_tail, console_tail) = self.tails();
        EndRecord {
            version: VERSION,
            vmm_pid: self.child.pid(),
            status: status.unwrap_or(casemate_process::UNKNOWN_STATUS),
            wanted,
            ended_unix_ns: unix_ns(),
            stderr_tail,
            console_tail,
            problems: Vec::new(),
        }
    }

    /// Stop serving the device.
    pub fn close(&self) {
        close(self.vsock.as_ref());
    }
}

impl AsFd for Vmm {
    /// Readable when it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }
}

fn close(vsock: Option<&VsockBackend>) {
    if let Some(vsock) = vsock
        && let Err(error) = vsock.close()
    {
        log::error!("the vsock back end: {error}");
    }
}
