//! Connections: the one that the agent makes to its host to say that it is ready, and those that come.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_ttrpc::{Handler, serve_connection};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, listen, socket,
};

use crate::error::{AgentError, Context, Result};
use crate::init::modules::ModuleLoader;
use crate::marks::mark;

/// Where agents listen.
pub const AGENT_PORT: u32 = 1024;
const HOST_CID: u32 = 2;
const BACKLOG: i32 = 16;
/// The device must be there and the host must listen within this time.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// Longest pause between two attempts; modules and events end it earlier.
const MAX_PAUSE: Duration = Duration::from_millis(20);

/// Makes the handler of a new connection.
pub type NewHandler = Arc<dyn Fn() -> Result<Arc<dyn Handler>> + Send + Sync>;

fn vsock_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

/// Try until it works: the socket family comes with a module, the transport with its device.
fn retry<T>(what: &str, modules: &ModuleLoader, mut attempt: impl FnMut() -> nix::Result<T>) -> Result<T> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(errno) if started.elapsed() > CONNECT_LIMIT => {
                return Err(AgentError::system("vsock", what, errno));
            }
            Err(_) => {
                if modules.wait_for_change(pause) {
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }
}

/// Connect to the host and serve it until it hangs up.
pub fn serve_host(port: u32, modules: &ModuleLoader, new_handler: &NewHandler) -> Result<()> {
    let address = VsockAddr::new(HOST_CID, port);
    let stream = retry(&format!("connection to host port {port}"), modules, || {
        let stream = vsock_socket()?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&stream), &address).map(|()| stream)
    })?;
    mark("connected");
    serve(stream, new_handler);
    Ok(())
}

/// Listen on the agents' port, for whoever comes.
pub fn serve_vsock(modules: &ModuleLoader, new_handler: &NewHandler) -> Result<()> {
    let listener = retry("listener", modules, || {
        let listener = vsock_socket()?;
        bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT))?;
        listen(&listener, Backlog::new(BACKLOG)?).map(|()| listener)
    })?;
    mark("listening");
    loop {
        let fd = match accept4(std::os::fd::AsRawFd::as_raw_fd(&listener), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => fd,
            Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
            Err(errno) => return Err(AgentError::system("accept on", "vsock", errno)),
        };
        // SAFETY: the kernel has just made this descriptor for us.
        serve_in_thread(unsafe { OwnedFd::from_raw_fd(fd) }, new_handler);
    }
}

/// Listen on a unix socket: for an agent that is an ordinary process.
pub fn serve_unix(path: &str, new_handler: &NewHandler) -> Result<()> {
    let listener = UnixListener::bind(path).context("listen on", path)?;
    for stream in listener.incoming() {
        serve_in_thread(stream.context("accept on", path)?.into(), new_handler);
    }
    Ok(())
}

fn serve_in_thread(stream: OwnedFd, new_handler: &NewHandler) {
    let new_handler = Arc::clone(new_handler);
    let thread = std::thread::Builder::new().name("connection".to_owned());
    if let Err(error) = thread.spawn(move || serve(stream, &new_handler)) {
        log::error!("thread of a connection: {error}");
    }
}

fn serve(stream: OwnedFd, new_handler: &NewHandler) {
    let result = new_handler().map(|handler| serve_connection(stream, &handler));
    match result {
        Ok(Ok(())) => log::debug!("connection closed"),
        Ok(Err(error)) => log::warn!("connection: {error}"),
        Err(error) => log::error!("{error}"),
    }
}
