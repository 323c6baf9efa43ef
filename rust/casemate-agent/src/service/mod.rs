//! The requests of one connection: what each is, where it runs, what is answered.

pub mod details;

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use casemate_proto::casemate::AwaitDeviceRequest;
use casemate_proto::{AGENT_SERVICE, API_VERSION, DEVICE_SERVICE, HEALTH_SERVICE, RPCS, grpc};
use casemate_ttrpc::{Code, ConnectionHandle, Handler, Responder, ServerRequest, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::Message;

use crate::device::presence;
use crate::error::{AgentError, Result};
use crate::ordering::{Class, Ordering, Released, Submitted, Ticket};
use crate::pump::Pump;
use crate::sandbox::Sandbox;
use crate::stream::Caller;

/// Our own service: `Echo` answers with the request, for measurements of the way between.
pub const DIAGNOSTICS_SERVICE: &str = "casemate.Diagnostics";

/// Where a request runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On the thread that has it; it does not wait.
    Here,
    /// On the connection's thread for life-cycle requests.
    Worker,
    /// On a thread of its own.
    Thread,
}

type Run = Box<dyn FnOnce(&Arc<Connection>) + Send>;

/// A request ready to be run.
struct Job {
    place: Place,
    run: Run,
}

/// One connection.
struct Connection {
    sandbox: Arc<Sandbox>,
    shutdown: Arc<dyn Fn() + Send + Sync>,
    pump: Arc<Pump>,
    ordering: Mutex<Ordering<Job>>,
    worker: OnceLock<Sender<(Ticket, Job)>>,
}

/// Serves one connection.
pub struct Service(Arc<Connection>);

impl std::fmt::Debug for Service {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Service").finish_non_exhaustive()
    }
}

impl Service {
    /// Serve `sandbox`; `shutdown` ends the guest after a DestroySandbox has been answered.
    pub fn handler(sandbox: Arc<Sandbox>, shutdown: Arc<dyn Fn() + Send + Sync>) -> Result<Arc<dyn Handler>> {
        Ok(Arc::new(Self(Arc::new(Connection {
            sandbox,
            shutdown,
            pump: Pump::new()?,
            ordering: Mutex::new(Ordering::new()),
            worker: OnceLock::new(),
        }))))
    }
}

fn answer<T: Message>(responder: Responder, result: Result<T>) {
    match result {
        Ok(message) => responder.ok(message.encode_to_vec()),
        Err(error) => responder.error(error.into()),
    }
}

fn answer_empty(responder: Responder, result: Result<()>) {
    answer(responder, result.map(|()| grpc::Empty {}));
}

fn decode<T: Message + Default>(payload: &[u8]) -> Result<T> {
    T::decode(payload).map_err(|source| AgentError::Undecodable { what: "the request", source })
}

impl Handler for Service {
    fn handle(&self, request: ServerRequest, responder: Responder) {
        log::debug!("{}/{}", request.service, request.method);
        match request.service.as_str() {
            HEALTH_SERVICE => handle_health(&request, responder),
            AGENT_SERVICE => self.0.handle_agent(&request, responder),
            DIAGNOSTICS_SERVICE => match request.method.as_str() {
                "Echo" => responder.ok(request.payload),
                other => responder.error(Status::unknown_method(other)),
            },
            DEVICE_SERVICE => self.0.handle_device(&request, responder),
            other => responder.error(Status::unknown_service(other)),
        }
    }

    fn connection_closed(&self, _connection: &ConnectionHandle) {
        self.0.pump.end();
    }
}

fn handle_health(request: &ServerRequest, responder: Responder) {
    match request.method.as_str() {
        "Check" => {
            let status = grpc::health_check_response::ServingStatus::Serving.into();
            answer(responder, Ok(grpc::HealthCheckResponse { status }));
        }
        "Version" => answer(
            responder,
            Ok(grpc::VersionCheckResponse {
                grpc_version: API_VERSION.to_owned(),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            }),
        ),
        other => responder.error(Status::unknown_method(other)),
    }
}

/// Decode the payload as `$type` and submit what is to be done with it.
macro_rules! submit {
    ($self:ident, $request:ident, $responder:ident, $type:ty, $place:expr, $class:expr, $run:expr) => {{
        match decode::<$type>(&$request.payload) {
            Err(error) => $responder.error(error.into()),
            Ok(message) => {
                let class_of: fn(&$type) -> Class = $class;
                let class = class_of(&message);
                let run: fn(&Arc<Connection>, $type, Responder) = $run;
                let run = Box::new(move |connection: &Arc<Connection>| run(connection, message, $responder));
                $self.submit(class, Job { place: $place, run });
            }
        }
    }};
}

impl Connection {
    #[allow(
        clippy::too_many_lines,
        reason = "one table: method, message, where it runs, what it waits for, what it does"
    )]
    fn handle_agent(self: &Arc<Self>, request: &ServerRequest, responder: Responder) {
        use Class::{Create, Exec, Process, Remove, Side, Start, StartedProcess};
        use Place::{Here, Thread, Worker};
        match request.method.as_str() {
            "CreateSandbox" => submit!(
                self,
                request,
                responder,
                grpc::CreateSandboxRequest,
                Worker,
                |_| Class::Sandbox,
                |connection, message, responder| answer_empty(responder, connection.sandbox.create(&message))
            ),
            "DestroySandbox" => {
                let handle = request.connection.clone();
                let run =
                    Box::new(move |connection: &Arc<Self>| connection.destroy_sandbox(responder, &handle));
                self.submit(Class::Sandbox, Job { place: Worker, run });
            }
            "CreateContainer" => submit!(
                self,
                request,
                responder,
                grpc::CreateContainerRequest,
                Worker,
                |message| Create(message.container_id.clone()),
                |connection, message, responder| {
                    answer_empty(responder, connection.sandbox.create_container(message));
                }
            ),
            "StartContainer" => submit!(
                self,
                request,
                responder,
                grpc::StartContainerRequest,
                Worker,
                |message| Start(message.container_id.clone()),
                |connection, message, responder| {
                    answer_empty(responder, connection.sandbox.start_container(&message));
                }
            ),
            "RemoveContainer" => submit!(
                self,
                request,
                responder,
                grpc::RemoveContainerRequest,
                Worker,
                |message| Remove(message.container_id.clone()),
                |connection, message, responder| {
                    answer_empty(responder, connection.sandbox.remove_container(&message));
                }
            ),
            "ExecProcess" => submit!(
                self,
                request,
                responder,
                grpc::ExecProcessRequest,
                Thread,
                |message| Exec(message.container_id.clone(), message.exec_id.clone()),
                |connection, message, responder| answer_empty(responder, connection.sandbox.exec(message))
            ),
            "SignalProcess" => submit!(
                self,
                request,
                responder,
                grpc::SignalProcessRequest,
                Here,
                |message| StartedProcess(message.container_id.clone(), message.exec_id.clone()),
                |connection, message, responder| {
                    let container = connection.sandbox.container(&message.container_id);
                    let result =
                        container.and_then(|container| container.signal(&message.exec_id, message.signal));
                    answer_empty(responder, result);
                }
            ),
            "WaitProcess" => submit!(
                self,
                request,
                responder,
                grpc::WaitProcessRequest,
                Here,
                |message| Process(message.container_id.clone(), message.exec_id.clone()),
                |connection, message, responder| connection.wait_process(&message, responder)
            ),
            "ReadStdout" | "ReadStderr" => self.submit_read(request, responder),
            "WriteStdin" => submit!(
                self,
                request,
                responder,
                grpc::WriteStreamRequest,
                Here,
                |message| Process(message.container_id.clone(), message.exec_id.clone()),
                |connection, message, responder| {
                    match connection.sandbox.process(&message.container_id, &message.exec_id) {
                        Ok(process) => process.stdin().write(connection.caller(responder), message.data),
                        Err(error) => responder.error(error.into()),
                    }
                }
            ),
            "CloseStdin" => submit!(
                self,
                request,
                responder,
                grpc::CloseStdinRequest,
                Here,
                |message| Process(message.container_id.clone(), message.exec_id.clone()),
                |connection, message, responder| {
                    let process = connection.sandbox.process(&message.container_id, &message.exec_id);
                    answer_empty(responder, process.map(|process| process.stdin().close()));
                }
            ),
            "TtyWinResize" => submit!(
                self,
                request,
                responder,
                grpc::TtyWinResizeRequest,
                Here,
                |message| Process(message.container_id.clone(), message.exec_id.clone()),
                |connection, message, responder| {
                    let process = connection.sandbox.process(&message.container_id, &message.exec_id);
                    answer_empty(
                        responder,
                        process.and_then(|process| process.resize(message.row, message.column)),
                    );
                }
            ),
            "StatsContainer" => submit!(
                self,
                request,
                responder,
                grpc::StatsContainerRequest,
                Thread,
                |message| Side(message.container_id.clone()),
                |connection, message, responder| {
                    let container = connection.sandbox.container(&message.container_id);
                    answer(responder, container.map(|container| container.stats()));
                }
            ),
            "PauseContainer" => submit!(
                self,
                request,
                responder,
                grpc::PauseContainerRequest,
                Thread,
                |message| Side(message.container_id.clone()),
                |connection, message, responder| {
                    let container = connection.sandbox.container(&message.container_id);
                    answer_empty(responder, container.and_then(|container| container.pause()));
                }
            ),
            "ResumeContainer" => submit!(
                self,
                request,
                responder,
                grpc::ResumeContainerRequest,
                Thread,
                |message| Side(message.container_id.clone()),
                |connection, message, responder| {
                    let container = connection.sandbox.container(&message.container_id);
                    answer_empty(responder, container.and_then(|container| container.resume()));
                }
            ),
            "UpdateContainer" => submit!(
                self,
                request,
                responder,
                grpc::UpdateContainerRequest,
                Thread,
                |message| Side(message.container_id.clone()),
                |connection, message, responder| {
                    let result = connection.sandbox.container(&message.container_id);
                    let result = result.and_then(|container| match &message.resources {
                        Some(resources) => container.update(resources),
                        None => Ok(()),
                    });
                    answer_empty(responder, result);
                }
            ),
            "GetGuestDetails" => match decode::<grpc::GuestDetailsRequest>(&request.payload) {
                Ok(message) => {
                    answer(responder, details::guest_details(&message, self.sandbox.parts.is_init))
                }
                Err(error) => responder.error(error.into()),
            },
            other => responder.error(unserved(other)),
        }
    }

    /// Waits for no other request, and none for it: its end is as near as its deadline.
    fn handle_device(self: &Arc<Self>, request: &ServerRequest, responder: Responder) {
        if request.method != "AwaitDevice" {
            return responder.error(Status::unknown_method(&request.method));
        }
        match decode::<AwaitDeviceRequest>(&request.payload) {
            Err(error) => responder.error(error.into()),
            Ok(message) => {
                let connection = Arc::clone(self);
                let wait = move || {
                    let events = &connection.sandbox.parts.events;
                    answer(responder, presence::await_device(events, &message));
                };
                // A thread that can't be made drops the responder, which answers.
                if let Err(error) = std::thread::Builder::new().name("request".to_owned()).spawn(wait) {
                    log::error!("thread of a request: {error}");
                }
            }
        }
    }

    fn submit_read(self: &Arc<Self>, request: &ServerRequest, responder: Responder) {
        let is_stderr = request.method == "ReadStderr";
        match decode::<grpc::ReadStreamRequest>(&request.payload) {
            Err(error) => responder.error(error.into()),
            Ok(message) => {
                let class = Class::Process(message.container_id.clone(), message.exec_id.clone());
                let run =
                    Box::new(move |connection: &Arc<Self>| connection.read(&message, is_stderr, responder));
                self.submit(class, Job { place: Place::Here, run });
            }
        }
    }

    fn read(&self, message: &grpc::ReadStreamRequest, is_stderr: bool, responder: Responder) {
        let process = self.sandbox.process(&message.container_id, &message.exec_id);
        let stream = process.and_then(|process| {
            if is_stderr { process.stderr().cloned() } else { Ok(Arc::clone(process.stdout())) }
        });
        match stream {
            Ok(stream) => stream.read(self.caller(responder), message.len),
            Err(error) => responder.error(error.into()),
        }
    }

    fn wait_process(&self, message: &grpc::WaitProcessRequest, responder: Responder) {
        let container = self.sandbox.container(&message.container_id);
        let process = container.and_then(|container| {
            let process = container.process(&message.exec_id)?;
            container.note_told(&message.exec_id);
            Ok(process)
        });
        match process {
            Ok(process) => process.wait(self.caller(responder)),
            Err(error) => responder.error(error.into()),
        }
    }

    fn destroy_sandbox(&self, responder: Responder, connection: &ConnectionHandle) {
        let result = self.sandbox.destroy();
        let is_over = result.is_ok();
        answer_empty(responder, result);
        if is_over {
            // The answer is on its way when the caller hangs up; one that does not is not waited for long.
            const HANG_UP_LIMIT: Duration = Duration::from_millis(50);
            let timeout = PollTimeout::try_from(HANG_UP_LIMIT).unwrap_or(PollTimeout::ZERO);
            if let Err(errno) =
                poll(&mut [PollFd::new(connection.closed_event(), PollFlags::POLLIN)], timeout)
            {
                log::debug!("poll: {errno}");
            }
            (self.shutdown)();
        }
    }

    fn caller(&self, responder: Responder) -> Caller {
        Caller { responder, pump: Arc::clone(&self.pump) }
    }

    fn submit(self: &Arc<Self>, class: Class, job: Job) {
        let submitted = self.ordering.lock().unwrap_or_else(PoisonError::into_inner).submit(class, job);
        match submitted {
            Submitted::Run(job) => (job.run)(self),
            Submitted::RunTracked(ticket, job) => self.start(ticket, job),
            Submitted::Held => {}
        }
    }

    fn start(self: &Arc<Self>, ticket: Ticket, job: Job) {
        match job.place {
            Place::Here => self.run(ticket, job),
            Place::Worker => {
                let worker = self.worker.get_or_init(|| self.start_worker());
                if worker.send((ticket, job)).is_err() {
                    // The job is dropped, which answers its caller.
                    self.finish(ticket);
                }
            }
            Place::Thread => {
                let connection = Arc::clone(self);
                let thread = std::thread::Builder::new().name("request".to_owned());
                if let Err(error) = thread.spawn(move || connection.run(ticket, job)) {
                    log::error!("thread of a request: {error}");
                    self.finish(ticket);
                }
            }
        }
    }

    fn run(self: &Arc<Self>, ticket: Ticket, job: Job) {
        (job.run)(self);
        self.finish(ticket);
    }

    /// Its thread ends with the connection, which holds the only sender.
    fn start_worker(self: &Arc<Self>) -> Sender<(Ticket, Job)> {
        let (sender, receiver) = channel::<(Ticket, Job)>();
        let connection = Arc::downgrade(self);
        let spawned = std::thread::Builder::new().name("life-cycle".to_owned()).spawn(move || {
            while let Ok((ticket, job)) = receiver.recv() {
                let Some(connection) = connection.upgrade() else { return };
                connection.run(ticket, job);
            }
        });
        if let Err(error) = spawned {
            log::error!("life-cycle thread: {error}");
        }
        sender
    }

    fn finish(self: &Arc<Self>, ticket: Ticket) {
        loop {
            let released = self.ordering.lock().unwrap_or_else(PoisonError::into_inner).finish(ticket);
            match released {
                Released::Untracked(jobs) => jobs.into_iter().for_each(|job| (job.run)(self)),
                Released::Tracked(jobs) => {
                    return jobs.into_iter().for_each(|(ticket, job)| self.start(ticket, job));
                }
            }
        }
    }
}

/// A method of the protocol that this agent does not serve, or none of the protocol.
fn unserved(method: &str) -> Status {
    let is_known = RPCS.iter().any(|(service, name)| *service == AGENT_SERVICE && *name == method);
    if is_known {
        Status::new(Code::Unimplemented, format!("{method} is not implemented"))
    } else {
        Status::unknown_method(method)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_unserved_when_known_or_not_then_unimplemented() {
        assert_eq!(unserved("ResizeVolume").code, i32::from(Code::Unimplemented));
        assert_eq!(unserved("Nothing").code, i32::from(Code::Unimplemented));
    }
}
