//! The terminal of a process, opened in the container's own devpts so that it has a name there.

use std::ffi::CStr;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::launch::status::{Step, StepError};

type Result<T> = std::result::Result<T, StepError>;

nix::ioctl_read!(get_pty_number, b'T', 0x30, libc::c_uint);
nix::ioctl_write_ptr!(set_pty_lock, b'T', 0x31, libc::c_int);
nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);

/// Both sides of a pseudo terminal.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    number: u32,
}

impl Terminal {
    /// Open one in the container, with the size that the process asks for.
    pub fn open(process: &grpc::Process) -> Result<Self> {
        const PTMX: &str = "/dev/pts/ptmx";
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = open(PTMX, flags, Mode::empty()).step("open", PTMX)?;
        let (mut number, unlocked) = (0, 0);
        // SAFETY: both calls get an open descriptor and a pointer to a live number of the type they use.
        unsafe {
            set_pty_lock(master.as_raw_fd(), &raw const unlocked).step("unlock", PTMX)?;
            get_pty_number(master.as_raw_fd(), &raw mut number).step("number of", PTMX)?;
        }
        // By the master and not by a path: the container could put something else at the path.
        // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor or an error.
        let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER as _, flags.bits()) };
        let slave = Errno::result(slave).step("open slave of", PTMX)?;
        // SAFETY: the kernel has just made this descriptor for us.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        if let Some(size) = process.console_size.filter(|size| size.height > 0 && size.width > 0) {
            let clamp = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
            let size = libc::winsize {
                ws_row: clamp(size.height),
                ws_col: clamp(size.width),
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // SAFETY: an open terminal and a live structure.
            unsafe { set_window_size(master.as_raw_fd(), &raw const size) }.step("set size of", PTMX)?;
        }
        Ok(Self { master, slave, number })
    }

    /// Make it `/dev/console` of the container.
    pub fn bind_console(&self) -> Result<()> {
        const CONSOLE: &str = "/dev/console";
        let created = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(CONSOLE);
        drop(created.step("create", CONSOLE)?);
        let source = format!("/dev/pts/{}", self.number);
        mount(Some(source.as_str()), CONSOLE, None::<&CStr>, MsFlags::MS_BIND, None::<&CStr>)
            .step("bind", CONSOLE)
    }

    /// Make it this session's terminal and descriptors 0 to 2; the other side.
    pub fn take_over(self) -> Result<OwnedFd> {
        // SAFETY: TIOCSCTTY takes a number.
        let result = unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY as _, 0) };
        Errno::result(result).step("control", "terminal")?;
        dup2_stdin(&self.slave).step("dup", "stdin")?;
        dup2_stdout(&self.slave).step("dup", "stdout")?;
        dup2_stderr(&self.slave).step("dup", "stderr")?;
        Ok(self.master)
    }
}
