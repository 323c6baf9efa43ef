//! `Connection`: the agent's client.

use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use casemate_proto::{AGENT_SERVICE, RPCS, grpc};
use casemate_ttrpc::client::Waited;
use casemate_ttrpc::frame::StreamMap;
use casemate_ttrpc::slots::{Answer, Piece};
use casemate_ttrpc::{Call, Client, StreamId, TtrpcError};
use prost::Message;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyList};

use crate::error::Error;
use crate::wait::{Owner, in_slices, optional_duration, take_fd, watched_fd};

/// What a slot's answer is made of.
#[derive(Clone, Debug)]
enum Kind {
    Json { service: &'static str, method: &'static str },
    Raw { method: Box<str> },
    WriteStdin,
    Read { method: &'static str },
}

impl Kind {
    fn method(&self) -> &str {
        match self {
            Self::Json { method, .. } | Self::Read { method } => method,
            Self::Raw { method } => method,
            Self::WriteStdin => "WriteStdin",
        }
    }
}

/// One ttrpc connection to an agent, as client.
#[pyclass(frozen, module = "casemate._core")]
pub struct Connection {
    owner: Owner,
    client: Client,
    /// Locked before the client is, so that no answer is seen before its kind.
    kinds: Mutex<StreamMap<Kind>>,
}

impl Connection {
    fn checked(&self) -> Result<&Client, Error> {
        self.owner.check("the connection")?;
        Ok(&self.client)
    }

    fn lock_kinds(&self) -> MutexGuard<'_, StreamMap<Kind>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(
        &self,
        service: &str,
        payload: &[u8],
        own: impl FnOnce() -> Piece,
        timeout: Option<Duration>,
        kind: Kind,
    ) -> Result<u32, Error> {
        let client = self.checked()?;
        let call = Call { service, method: kind.method(), payload, timeout, metadata: &[] };
        let mut kinds = self.lock_kinds();
        let submitted = client.submit_kept(&call, own);
        match submitted {
            Ok(slot) => {
                kinds.insert(slot, kind);
                Ok(slot.0)
            }
            Err(error) => {
                drop(kinds);
                Err(Error::from_call(kind.method(), error))
            }
        }
    }

    /// As [`Self::send`] for a message that was made here; what the socket does not take is copied.
    fn send_own(
        &self,
        service: &str,
        payload: &[u8],
        timeout: Option<Duration>,
        kind: Kind,
    ) -> Result<u32, Error> {
        self.send(service, payload, || Piece::new(payload.to_vec()), timeout, kind)
    }

    /// Sends a request and waits; nobody else knows its slot. An interrupted wait forgets it.
    fn call_and_wait<'py>(
        &self,
        py: Python<'py>,
        call: &Call<'_>,
        own: impl FnOnce() -> Piece,
        kind: &Kind,
    ) -> Result<Bound<'py, PyBytes>, Error> {
        let client = self.checked()?;
        let slot = client.submit_kept(call, own).map_err(|error| Error::from_call(call.method, error))?;
        match in_slices(py, None, |limit| client.wait_until(slot, limit)) {
            Ok(answer) => self.value_of(py, slot, kind, answer),
            Err(interrupted) => {
                client.cancel(slot);
                Err(interrupted)
            }
        }
    }

    /// The Python value of an answer; forgets the slot's kind.
    fn finish<'py>(
        &self,
        py: Python<'py>,
        slot: StreamId,
        answer: Answer,
    ) -> Result<Bound<'py, PyBytes>, Error> {
        let Some(kind) = self.lock_kinds().remove(&slot) else {
            return Err(Error::from_call("wait", TtrpcError::UnknownSlot { slot }));
        };
        self.value_of(py, slot, &kind, answer)
    }

    /// The Python value of an answer of this kind.
    fn value_of<'py>(
        &self,
        py: Python<'py>,
        slot: StreamId,
        kind: &Kind,
        answer: Answer,
    ) -> Result<Bound<'py, PyBytes>, Error> {
        let method = kind.method();
        let payload = answer.map_err(|error| Error::from_call(method, error))?;
        let malformed = |_| Error::from_call(method, TtrpcError::Malformed { stream: slot });
        let result = match kind {
            Kind::Raw { .. } => Ok(PyBytes::new(py, &payload)),
            Kind::Json { service, method } => casemate_proto::wire_to_json(service, method, &payload)
                .map(|json| PyBytes::new(py, &json))
                .map_err(|error| Error::from_proto(method, &error)),
            Kind::Read { .. } => grpc::ReadStreamResponse::decode(&payload[..])
                .map(|answer| PyBytes::new(py, &answer.data))
                .map_err(malformed),
            Kind::WriteStdin => grpc::WriteStreamResponse::decode(&payload[..])
                .map(|answer| PyBytes::new(py, answer.len.to_string().as_bytes()))
                .map_err(malformed),
        };
        self.client.recycle(payload);
        result
    }
}

/// The RPC's names with the life of the program.
fn find_rpc(service: &str, method: &str) -> Option<(&'static str, &'static str)> {
    RPCS.iter().copied().find(|rpc| *rpc == (service, method))
}

/// The RPC's names with the life of the program, and the message of a JSON document.
fn encode(
    service: &str,
    method: &str,
    document: &[u8],
) -> Result<(&'static str, &'static str, Vec<u8>), Error> {
    let payload = casemate_proto::json_to_wire(service, method, document)
        .map_err(|error| Error::from_proto(method, &error))?;
    let (service, method) = find_rpc(service, method)
        .ok_or_else(|| Error::invalid(format!("no RPC {service}/{method}"), "method"))?;
    Ok((service, method, payload))
}

#[pymethods]
impl Connection {
    #[new]
    #[pyo3(signature = (take_fd, *, watch=None))]
    fn new(take_fd: RawFd, watch: Option<&Bound<'_, PyAny>>) -> Result<Self, Error> {
        let socket = self::take_fd(take_fd)?;
        let pidfd = watch.map(watched_fd).transpose()?;
        let client =
            Client::new(socket, pidfd).map_err(|error| Error::agent_connection(error.to_string()))?;
        Ok(Self { owner: Owner::this_process(), client, kinds: Mutex::default() })
    }

    /// The socket, borrowed; -1 when closed.
    fn fileno(&self) -> Result<RawFd, Error> {
        Ok(self.checked()?.socket().unwrap_or(-1))
    }

    /// Send a request given as JSON, return its slot.
    #[pyo3(signature = (service, method, request, *, timeout_s=None))]
    fn submit(
        &self,
        service: &str,
        method: &str,
        request: &[u8],
        timeout_s: Option<f64>,
    ) -> Result<u32, Error> {
        let timeout = optional_duration(timeout_s, "timeout_s")?;
        let (service, method, payload) = encode(service, method, request)?;
        self.send_own(service, &payload, timeout, Kind::Json { service, method })
    }

    /// Send a protobuf message; its answer is one too.
    #[pyo3(signature = (service, method, request, *, timeout_s=None))]
    fn submit_raw(
        &self,
        service: &str,
        method: &str,
        request: &Bound<'_, PyBytes>,
        timeout_s: Option<f64>,
    ) -> Result<u32, Error> {
        let timeout = optional_duration(timeout_s, "timeout_s")?;
        let own = || Piece::new(PyBackedBytes::from(request.clone()));
        self.send(service, request.as_bytes(), own, timeout, Kind::Raw { method: method.into() })
    }

    /// WriteStdin; the answer is the decimal count of bytes taken.
    #[pyo3(signature = (container_id, exec_id, data, *, timeout_s=None))]
    fn submit_write_stdin(
        &self,
        container_id: String,
        exec_id: String,
        data: &[u8],
        timeout_s: Option<f64>,
    ) -> Result<u32, Error> {
        let timeout = optional_duration(timeout_s, "timeout_s")?;
        let request = grpc::WriteStreamRequest { container_id, exec_id, data: data.to_vec() };
        self.send_own(AGENT_SERVICE, &request.encode_to_vec(), timeout, Kind::WriteStdin)
    }

    /// ReadStdout or ReadStderr of at most `length` bytes.
    #[pyo3(signature = (container_id, exec_id, length, *, stderr=false))]
    fn submit_read(
        &self,
        container_id: String,
        exec_id: String,
        length: u32,
        stderr: bool,
    ) -> Result<u32, Error> {
        let request = grpc::ReadStreamRequest { container_id, exec_id, len: length };
        let method = if stderr { "ReadStderr" } else { "ReadStdout" };
        self.send_own(AGENT_SERVICE, &request.encode_to_vec(), None, Kind::Read { method })
    }

    /// The answer of `slot`, once.
    fn wait<'py>(&self, py: Python<'py>, slot: u32) -> Result<Bound<'py, PyBytes>, Error> {
        let client = self.checked()?;
        let slot = StreamId(slot);
        let answer = in_slices(py, None, |limit| client.wait_until(slot, limit))?;
        self.finish(py, slot, answer)
    }

    /// `submit` and `wait` in one; a wait that is interrupted forgets the request.
    #[pyo3(signature = (service, method, request, timeout_s=None))]
    fn call<'py>(
        &self,
        py: Python<'py>,
        service: &str,
        method: &str,
        request: &[u8],
        timeout_s: Option<f64>,
    ) -> Result<Bound<'py, PyBytes>, Error> {
        let timeout = optional_duration(timeout_s, "timeout_s")?;
        let (service, method, payload) = encode(service, method, request)?;
        let call = Call { service, method, payload: &payload, timeout, metadata: &[] };
        let own = || Piece::new(payload.clone());
        self.call_and_wait(py, &call, own, &Kind::Json { service, method })
    }

    /// `submit_raw` and `wait` in one, as `call`.
    #[pyo3(signature = (service, method, request, timeout_s=None))]
    fn call_raw<'py>(
        &self,
        py: Python<'py>,
        service: &str,
        method: &str,
        request: &Bound<'py, PyBytes>,
        timeout_s: Option<f64>,
    ) -> Result<Bound<'py, PyBytes>, Error> {
        let timeout = optional_duration(timeout_s, "timeout_s")?;
        let call = Call { service, method, payload: request.as_bytes(), timeout, metadata: &[] };
        let own = || Piece::new(PyBackedBytes::from(request.clone()));
        self.call_and_wait(py, &call, own, &Kind::Raw { method: method.into() })
    }

    /// Those of `slots` whose `wait` would not block, at least one; empty at `timeout_s`.
    #[pyo3(signature = (slots, timeout_s=None))]
    fn wait_any(&self, py: Python<'_>, slots: Vec<u32>, timeout_s: Option<f64>) -> Result<Vec<u32>, Error> {
        let client = self.checked()?;
        let timeout = optional_duration(timeout_s, "timeout_s")?;
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let slots: Vec<StreamId> = slots.into_iter().map(StreamId).collect();
        let wait_once = |limit: Option<Instant>| match client.wait_ready(&slots, limit) {
            Waited::Ready(ready) => Some(ready.into_iter().map(|slot| slot.0).collect()),
            _ if until.is_some_and(|until| until <= Instant::now()) => Some(Vec::new()),
            _ => None,
        };
        in_slices(py, until, wait_once)
    }

    /// Forget the slot; a late answer is dropped and counted.
    fn cancel(&self, slot: u32) -> Result<(), Error> {
        self.checked()?.cancel(StreamId(slot));
        self.lock_kinds().remove(&StreamId(slot));
        Ok(())
    }

    /// Read what is there; return finished slots with answer or exception.
    fn on_readable<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyList>, Error> {
        let finished = PyList::empty(py);
        for (slot, answer) in self.checked()?.on_readable() {
            match self.finish(py, slot, answer) {
                Ok(answer) => finished.append((slot.0, answer))?,
                Err(error) => finished.append((slot.0, PyErr::from(error).into_value(py)))?,
            }
        }
        Ok(finished)
    }

    /// Send what is kept.
    fn on_writable(&self) -> Result<(), Error> {
        self.checked()?.on_writable();
        Ok(())
    }

    /// Break the connection; return the open slots.
    fn fail(&self, text: String) -> Result<Vec<u32>, Error> {
        let open = self.checked()?.fail(&TtrpcError::Closed { reason: text });
        Ok(open.into_iter().map(|slot| slot.0).collect())
    }

    /// Whether bytes are kept that the socket did not take.
    #[getter]
    fn wants_write(&self) -> bool {
        self.client.wants_write()
    }

    /// Answers that came for slots already forgotten.
    #[getter]
    fn dropped_answers_total(&self) -> u64 {
        self.client.dropped_answers_total()
    }

    /// Whether the connection is closed or broken.
    #[getter]
    fn closed(&self) -> bool {
        self.client.broken().is_some()
    }

    /// Close; everything that waits ends with AgentConnectionError.
    fn close(&self) -> Result<(), Error> {
        self.checked()?.close();
        Ok(())
    }
}
