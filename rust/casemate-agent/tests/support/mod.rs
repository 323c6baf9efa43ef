//! An agent as an ordinary process, a client for it, and container images made of busybox.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use casemate_proto::{AGENT_SERVICE, HEALTH_SERVICE, grpc};
use casemate_ttrpc::frame::{FrameDecoder, FrameHeader, FrameKind, StreamId};
use casemate_ttrpc::message::{Request, Response, Status};
use prost::Message;

pub const LIMIT: Duration = Duration::from_secs(20);
const BUSYBOX: &str = "/bin/busybox";

/// Whether containers can be made here; says why not.
pub fn can_run() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    let has_busybox = Path::new(BUSYBOX).exists();
    if !is_root || !has_busybox {
        eprintln!("SKIPPED: needs root ({is_root}) and a static {BUSYBOX} ({has_busybox})");
    }
    is_root && has_busybox
}

/// An agent process with its directory; ended with it.
pub struct Agent {
    child: Child,
    pub directory: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("agent.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_casemate-agent"))
            .args(["--listen", &format!("unix://{}", socket.display())])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let agent = Self { child, directory };
        let started = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(started.elapsed() < LIMIT, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        agent
    }

    pub fn connect(&self) -> Client {
        Client::new(UnixStream::connect(self.directory.path().join("agent.sock")).expect("connects"))
    }

    /// An agent with a sandbox in it, and a client.
    pub fn with_sandbox() -> (Self, Client) {
        let agent = Self::start();
        let mut client = agent.connect();
        client.call("CreateSandbox", &grpc::CreateSandboxRequest::default()).expect("created");
        (agent, client)
    }

    /// Wait for the process's end; its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let started = Instant::now();
        while started.elapsed() < LIMIT {
            if let Some(status) = self.child.try_wait().expect("waits") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the agent does not end");
    }

    pub fn rootfs(&self, name: &str) -> PathBuf {
        let root = self.directory.path().join(name);
        for directory in ["bin", "etc", "tmp", "secret", "shown"] {
            std::fs::create_dir_all(root.join(directory)).expect("made");
        }
        std::fs::copy(BUSYBOX, root.join("bin/busybox")).expect("copied");
        for tool in [
            "sh", "cat", "echo", "sleep", "id", "stty", "ls", "readlink", "test", "kill", "tty", "mount",
            "dd",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(tool)).expect("linked");
        }
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/home/web:/bin/sh\n",
        )
        .expect("written");
        std::fs::write(root.join("etc/group"), "web:x:34:\nlogs:x:40:web\n").expect("written");
        std::fs::write(root.join("secret/file"), "hidden").expect("written");
        root
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // DestroySandbox ends containers with it; what a failed test left is killed by the launcher's and pid namespaces' end.
        if self.child.try_wait().ok().flatten().is_none() {
            let mut client = self.connect();
            drop(client.try_call(AGENT_SERVICE, "DestroySandbox", &grpc::DestroySandboxRequest {}));
            let started = Instant::now();
            while self.child.try_wait().ok().flatten().is_none() && started.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(2));
            }
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

pub fn mount(destination: &str, fstype: &str, source: &str, options: &[&str]) -> grpc::Mount {
    grpc::Mount {
        destination: destination.into(),
        r#type: fstype.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn capabilities(names: &[&str]) -> grpc::LinuxCapabilities {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    grpc::LinuxCapabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        ..Default::default()
    }
}

pub fn process(arguments: &[&str]) -> grpc::Process {
    grpc::Process {
        args: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        capabilities: Some(capabilities(&["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"])),
        no_new_privileges: true,
        ..Default::default()
    }
}

/// A request for a container like those that engines make.
pub fn container(id: &str, root: &Path, process: grpc::Process) -> grpc::CreateContainerRequest {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let namespaces = ["pid", "mount", "ipc", "uts", "cgroup"]
        .map(|kind| grpc::LinuxNamespace { r#type: kind.into(), path: String::new() });
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let spec = grpc::Spec {
        version: "1.0.2".into(),
        process: Some(process),
        root: Some(grpc::Root { path: root.display().to_string(), readonly: false }),
        mounts: vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k"]),
            mount(
                "/dev/pts",
                "devpts",
                "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
            ),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        linux: Some(grpc::Linux {
            cgroups_path: format!("/casemate-test-{}-{number}", std::process::id()),
            namespaces: namespaces.into(),
            masked_paths: texts(&["/proc/filesystems", "/secret", "/proc/not-there"]),
            readonly_paths: texts(&["/proc/sys", "/shown"]),
            ..Default::default()
        }),
        ..Default::default()
    };
    grpc::CreateContainerRequest {
        container_id: id.into(),
        exec_id: id.into(),
        oci: Some(spec),
        ..Default::default()
    }
}

/// A client that can have many requests under way.
pub struct Client {
    stream: UnixStream,
    decoder: FrameDecoder,
    next: u32,
    answers: HashMap<u32, Result<Vec<u8>, Status>>,
    order: Vec<u32>,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        Self { stream, decoder: FrameDecoder::new(), next: 1, answers: HashMap::new(), order: Vec::new() }
    }

    /// The frame of a request, and its stream.
    pub fn frame(&mut self, service: &str, method: &str, message: &impl Message) -> (u32, Vec<u8>) {
        let request = Request {
            service: service.into(),
            method: method.into(),
            payload: message.encode_to_vec(),
            ..Default::default()
        };
        let data = request.encode_to_vec();
        let id = self.next;
        self.next += 2;
        let data_bytes = u32::try_from(data.len()).expect("small");
        let header = FrameHeader { data_bytes, stream: StreamId(id), kind: FrameKind::Request, flags: 0 };
        let mut frame = header.encode().to_vec();
        frame.extend(data);
        (id, frame)
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("written");
    }

    pub fn send(&mut self, method: &str, message: &impl Message) -> u32 {
        let (id, frame) = self.frame(AGENT_SERVICE, method, message);
        self.write(&frame);
        id
    }

    /// Receive until `id` is answered.
    pub fn receive(&mut self, id: u32) -> Result<Vec<u8>, Status> {
        loop {
            if let Some(answer) = self.answers.remove(&id) {
                return answer;
            }
            let mut bytes = vec![0; 1 << 16];
            let count = self.stream.read(&mut bytes).expect("an answer in time");
            assert!(count > 0, "the agent hung up");
            self.decoder.extend(&bytes[..count]);
            while let Some(frame) = self.decoder.next_frame().expect("a frame") {
                let response = Response::decode(frame.data).expect("a response");
                let stream = frame.header.stream.0;
                let answer = match response.status {
                    Some(status) if status.code != 0 => Err(status),
                    _ => Ok(response.payload),
                };
                self.order.push(stream);
                self.answers.insert(stream, answer);
            }
        }
    }

    /// Streams in the order their answers came.
    pub fn answer_order(&self) -> &[u32] {
        &self.order
    }

    pub fn try_call(
        &mut self,
        service: &str,
        method: &str,
        message: &impl Message,
    ) -> Option<Result<Vec<u8>, Status>> {
        let (id, frame) = self.frame(service, method, message);
        self.stream.write_all(&frame).ok()?;
        Some(self.receive(id))
    }

    pub fn call(&mut self, method: &str, message: &impl Message) -> Result<Vec<u8>, Status> {
        let id = self.send(method, message);
        self.receive(id)
    }

    pub fn check(&mut self) -> Result<Vec<u8>, Status> {
        self.try_call(HEALTH_SERVICE, "Check", &grpc::CheckRequest::default()).expect("sent")
    }

    pub fn create_and_start(&mut self, request: &grpc::CreateContainerRequest) -> Result<(), Status> {
        self.call("CreateContainer", request)?;
        let start = grpc::StartContainerRequest { container_id: request.container_id.clone() };
        self.call("StartContainer", &start).map(drop)
    }

    /// All of a stream.
    pub fn read_all(&mut self, method: &str, container_id: &str, exec_id: &str) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let request = grpc::ReadStreamRequest {
                container_id: container_id.into(),
                exec_id: exec_id.into(),
                len: 32 << 10,
            };
            let answer = self.call(method, &request).expect("read");
            let data = grpc::ReadStreamResponse::decode(&answer[..]).expect("decodes").data;
            if data.is_empty() {
                return all;
            }
            all.extend(data);
        }
    }

    pub fn wait(&mut self, container_id: &str, exec_id: &str) -> i32 {
        let request = grpc::WaitProcessRequest { container_id: container_id.into(), exec_id: exec_id.into() };
        let answer = self.call("WaitProcess", &request).expect("waited");
        grpc::WaitProcessResponse::decode(&answer[..]).expect("decodes").status
    }

    /// Run a process in a container: output, error output, status.
    pub fn exec(
        &mut self,
        container_id: &str,
        exec_id: &str,
        process: grpc::Process,
    ) -> (String, String, i32) {
        let request = grpc::ExecProcessRequest {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            process: Some(process),
            ..Default::default()
        };
        self.call("ExecProcess", &request).expect("executed");
        let stdout = self.read_all("ReadStdout", container_id, exec_id);
        let stderr = self.read_all("ReadStderr", container_id, exec_id);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        (text(stdout), text(stderr), self.wait(container_id, exec_id))
    }
}
