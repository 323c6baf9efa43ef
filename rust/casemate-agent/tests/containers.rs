//! Whole containers, made by an agent that runs as an ordinary process of root.

#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use casemate_proto::casemate::AwaitDeviceRequest;
use casemate_proto::{AGENT_SERVICE, DEVICE_SERVICE, RPCS, grpc};
use casemate_ttrpc::Code;
use prost::Message;
use support::{Agent, can_run, container, mount, process};

const SLEEP: [&str; 2] = ["sleep", "1000"];

fn code(code: Code) -> i32 {
    code.into()
}

#[test]
fn test_agent_when_everything_is_sent_in_one_write_then_output_and_status() {
    if !can_run() {
        return;
    }
    let agent = Agent::start();
    let mut client = agent.connect();
    let root = agent.rootfs("root");
    let start = grpc::StartContainerRequest { container_id: "c1".into() };
    let read = grpc::ReadStreamRequest { container_id: "c1".into(), exec_id: "c1".into(), len: 100 };
    let wait = grpc::WaitProcessRequest { container_id: "c1".into(), exec_id: "c1".into() };
    let request = container("c1", &root, process(&["sh", "-c", "echo hello; exit 7"]));
    let frames = [
        client.frame(AGENT_SERVICE, "CreateSandbox", &grpc::CreateSandboxRequest::default()),
        client.frame(AGENT_SERVICE, "CreateContainer", &request),
        client.frame(AGENT_SERVICE, "StartContainer", &start),
        client.frame(AGENT_SERVICE, "ReadStdout", &read),
        client.frame(AGENT_SERVICE, "ReadStdout", &read),
        client.frame(AGENT_SERVICE, "WaitProcess", &wait),
    ];
    let all: Vec<u8> = frames.iter().flat_map(|(_, frame)| frame.clone()).collect();
    client.write(&all);
    for (id, _) in &frames[..3] {
        client.receive(*id).expect("done");
    }
    let mut read_answer =
        |id| grpc::ReadStreamResponse::decode(&client.receive(id).expect("read")[..]).expect("decodes").data;
    assert_eq!(read_answer(frames[3].0), b"hello\n");
    assert_eq!(read_answer(frames[4].0), b"");
    let status = client.receive(frames[5].0).expect("waited");
    assert_eq!(grpc::WaitProcessResponse::decode(&status[..]).expect("decodes").status, 7);
    let place = |index: usize| client.answer_order().iter().position(|id| *id == frames[index].0);
    assert!(place(3) < place(4), "reads of one stream are answered in order");
}

#[test]
fn test_create_container_when_program_is_missing_then_text_tells_errno_and_path() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let root = agent.rootfs("root");
    let error =
        client.call("CreateContainer", &container("c1", &root, process(&["/nope"]))).expect_err("missing");
    assert_eq!(error.message, "exec /nope: ENOENT: No such file or directory");
    assert_eq!(error.code, code(Code::Internal));
    let error =
        client.call("CreateContainer", &container("c1", &root, process(&["nope"]))).expect_err("missing");
    assert_eq!(error.message, "exec nope (PATH=/bin): ENOENT: No such file or directory");
    let error = client
        .call("CreateContainer", &container("c1", &root, process(&["/etc/passwd"])))
        .expect_err("no program");
    assert_eq!(error.message, "exec /etc/passwd: EACCES: Permission denied");
    // Nothing of the failed ones is left: the name is free.
    client.create_and_start(&container("c1", &root, process(&SLEEP))).expect("started");
}

#[test]
fn test_start_container_when_program_has_a_wrong_format_then_error_of_exec() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let root = agent.rootfs("root");
    let program = root.join("bin/bad");
    std::fs::write(&program, "no program").expect("written");
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("set");
    let error =
        client.create_and_start(&container("c1", &root, process(&["/bin/bad"]))).expect_err("wrong format");
    assert_eq!(error.message, "exec /bin/bad: ENOEXEC: Exec format error");
}

#[test]
fn test_container_when_started_then_isolated_as_specified() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let root = agent.rootfs("root");
    client.create_and_start(&container("c1", &root, process(&SLEEP))).expect("started");
    let mut run = |id: &str, script: &str| {
        let (stdout, stderr, status) = client.exec("c1", id, process(&["sh", "-c", script]));
        assert_eq!((stderr.as_str(), status), ("", 0), "{script}");
        stdout.trim_end().to_owned()
    };
    assert_eq!(run("e1", "cat /proc/1/comm"), "sleep");
    assert_eq!(run("e2", "ls /secret; ls /"), "bin\ndev\netc\nproc\nsecret\nshown\nsys\ntmp");
    assert_eq!(
        run("e3", "for f in null zero full random urandom tty; do test -c /dev/$f || echo $f; done"),
        ""
    );
    assert_eq!(run("e4", "readlink /dev/ptmx; readlink /dev/fd; cat /dev/null"), "pts/ptmx\n/proc/self/fd");
    assert_eq!(run("e5", "echo x 2>/dev/null >/shown/file || echo refused"), "refused");
    assert_eq!(run("e6", "echo x 2>/dev/null >/proc/sys/kernel/hostname || echo refused"), "refused");
    assert_eq!(run("e7", "cat /proc/filesystems"), "");
    assert_eq!(
        run(
            "e8",
            "cat /proc/self/cgroup | while IFS=: read a b c; do if test $a = 0; then echo $c; fi; done"
        ),
        "/"
    );
    assert_eq!(
        run("e9", "busybox grep -E 'NoNewPrivs|CapBnd|SigBlk' /proc/self/status")
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
        "SigBlk: 0000000000000000 CapBnd: 00000000000000e1 NoNewPrivs: 1"
    );
    assert_eq!(run("ea", "ls /proc/self/fd | busybox wc -l"), "4");
    let ignored = run(
        "eb",
        "while read key value; do if test $key = SigIgn:; then echo $value; fi; done </proc/self/status",
    );
    let sigpipe = 1 << (libc::SIGPIPE - 1);
    assert_eq!(
        u64::from_str_radix(&ignored, 16).expect("a mask") & sigpipe,
        0,
        "the agent ignores it, programs do not"
    );
}

#[test]
fn test_exec_when_user_environment_directory_and_limits_are_given_then_taken() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let root = agent.rootfs("root");
    client.create_and_start(&container("c1", &root, process(&SLEEP))).expect("started");
    let user = |user| Some(user);
    let mut numeric =
        process(&["sh", "-c", "id; echo $HOME $X; busybox pwd; ulimit -n; echo to-stderr >/dev/stderr"]);
    numeric.user = user(grpc::User { uid: 33, gid: 34, additional_gids: vec![40], ..Default::default() });
    numeric.env.push("X=y".into());
    numeric.cwd = "/tmp".into();
    numeric.rlimits = vec![grpc::PosixRlimit { r#type: "RLIMIT_NOFILE".into(), hard: 99, soft: 99 }];
    let (stdout, stderr, status) = client.exec("c1", "e1", numeric);
    assert_eq!(stdout, "uid=33(web) gid=34(web) groups=40(logs)\n/home/web y\n/tmp\n99\n");
    assert_eq!((stderr.as_str(), status), ("to-stderr\n", 0));
    let mut named = process(&["id"]);
    named.user = user(grpc::User { username: "web".into(), ..Default::default() });
    assert_eq!(client.exec("c1", "e2", named).0, "uid=33(web) gid=34(web) groups=40(logs)\n");
    let mut unknown = process(&["id"]);
    unknown.user = user(grpc::User { username: "nobody".into(), ..Default::default() });
    let request = grpc::ExecProcessRequest {
        container_id: "c1".into(),
        exec_id: "e3".into(),
        process: Some(unknown),
        ..Default::default()
    };
    let error = client.call("ExecProcess", &request).expect_err("unknown");
    assert!(error.message.starts_with("look up user nobody"), "{}", error.message);
}

#[test]
fn test_process_when_it_has_a_terminal_then_size_and_output_go_through_it() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let root = agent.rootfs("root");
    let mut shell = process(&["sh", "-c", "tty; stty size; read line; echo got $line; stty size"]);
    shell.terminal = true;
    shell.console_size = Some(grpc::Box { height: 24, width: 80 });
    client.create_and_start(&container("c1", &root, shell)).expect("started");
    let resize =
        grpc::TtyWinResizeRequest { container_id: "c1".into(), exec_id: "c1".into(), row: 50, column: 132 };
    let read = |client: &mut support::Client, until: &str| {
        let request = grpc::ReadStreamRequest { container_id: "c1".into(), exec_id: "c1".into(), len: 1000 };
        let mut text = String::new();
        while !text.contains(until) {
            let answer = client.call("ReadStdout", &request).expect("read");
            let data = grpc::ReadStreamResponse::decode(&answer[..]).expect("decodes").data;
            assert!(!data.is_empty(), "ended after {text:?}");
            text.push_str(&String::from_utf8(data).expect("text"));
        }
        text
    };
    assert_eq!(read(&mut client, "80\r\n"), "/dev/pts/0\r\n24 80\r\n");
    client.call("TtyWinResize", &resize).expect("resized");
    let write =
        grpc::WriteStreamRequest { container_id: "c1".into(), exec_id: "c1".into(), data: b"hi\n".to_vec() };
    let answer = client.call("WriteStdin", &write).expect("written");
    assert_eq!(grpc::WriteStreamResponse::decode(&answer[..]).expect("decodes").len, 3);
    assert_eq!(read(&mut client, "132\r\n"), "hi\r\ngot hi\r\n50 132\r\n");
    assert_eq!(client.read_all("ReadStdout", "c1", ""), b"");
    assert_eq!(client.wait("c1", ""), 0);
    let stderr = grpc::ReadStreamRequest { container_id: "c1".into(), exec_id: String::new(), len: 1 };
    assert!(client.call("ReadStderr", &stderr).is_err());
}

#[test]
fn test_resize_when_there_is_no_terminal_then_unavailable() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    client.create_and_start(&container("c1", &agent.rootfs("root"), process(&SLEEP))).expect("started");
    let resize = grpc::TtyWinResizeRequest { container_id: "c1".into(), ..Default::default() };
    assert_eq!(client.call("TtyWinResize", &resize).expect_err("no terminal").code, code(Code::Unavailable));
}

#[test]
fn test_stdin_when_much_is_written_and_read_slowly_then_nothing_is_lost() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    client.create_and_start(&container("c1", &agent.rootfs("root"), process(&["cat"]))).expect("started");
    let data: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    let writes: Vec<u32> = data
        .chunks(1_000_000)
        .map(|chunk| grpc::WriteStreamRequest {
            container_id: "c1".into(),
            data: chunk.to_vec(),
            ..Default::default()
        })
        .chain([grpc::WriteStreamRequest { container_id: "c1".into(), ..Default::default() }])
        .map(|request| client.send("WriteStdin", &request))
        .collect();
    // The pipes are full and the writes wait: others are served all the same.
    client.check().expect("serving");
    let read = client.read_all("ReadStdout", "c1", "c1");
    assert!(read == data, "{} bytes of {}", read.len(), data.len());
    for id in writes {
        client.receive(id).expect("written");
    }
    assert_eq!(client.wait("c1", "c1"), 0);
    let late = grpc::WriteStreamRequest { container_id: "c1".into(), data: vec![1], ..Default::default() };
    assert!(client.call("WriteStdin", &late).expect_err("closed").message.contains("EPIPE"));
    let close = grpc::CloseStdinRequest { container_id: "c1".into(), exec_id: "c1".into() };
    client.call("CloseStdin", &close).expect("closed already");
}

#[test]
fn test_read_when_length_is_absurd_then_clamped() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let script = ["dd", "if=/dev/zero", "bs=1M", "count=5"];
    client.create_and_start(&container("c1", &agent.rootfs("root"), process(&script))).expect("started");
    let read = grpc::ReadStreamRequest { container_id: "c1".into(), exec_id: "c1".into(), len: u32::MAX };
    let mut total = 0;
    loop {
        let answer = client.call("ReadStdout", &read).expect("read");
        let bytes = grpc::ReadStreamResponse::decode(&answer[..]).expect("decodes").data.len();
        assert!(bytes <= 1 << 20);
        total += bytes;
        if bytes == 0 {
            break;
        }
    }
    assert_eq!(total, 5 << 20);
}

#[test]
fn test_wait_when_output_is_held_by_another_process_then_stream_ends() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    client.create_and_start(&container("c1", &agent.rootfs("root"), process(&SLEEP))).expect("started");
    let request = grpc::ExecProcessRequest {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        process: Some(process(&["sh", "-c", "sleep 1000 & echo out"])),
        ..Default::default()
    };
    client.call("ExecProcess", &request).expect("executed");
    assert_eq!(client.wait("c1", "e1"), 0);
    assert_eq!(client.wait("c1", "e1"), 0, "the end can be asked for again");
    assert_eq!(client.read_all("ReadStdout", "c1", "e1"), b"out\n");
}

#[test]
fn test_signal_when_sent_to_processes_then_status_is_128_and_more() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let root = agent.rootfs("root");
    client.create_and_start(&container("c1", &root, process(&SLEEP))).expect("started");
    let request = grpc::ExecProcessRequest {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        process: Some(process(&SLEEP)),
        ..Default::default()
    };
    client.call("ExecProcess", &request).expect("executed");
    assert!(client.call("ExecProcess", &request).expect_err("twice").message.contains("exists"));
    let signal = |exec_id: &str, signal| grpc::SignalProcessRequest {
        container_id: "c1".into(),
        exec_id: exec_id.into(),
        signal,
    };
    client.call("SignalProcess", &signal("e1", 15)).expect("sent");
    assert_eq!(client.wait("c1", "e1"), 128 + 15);
    client.call("SignalProcess", &signal("e1", 9)).expect("gone already is no error");
    assert!(client.call("SignalProcess", &signal("c1", 65)).is_err());
    // The first process has no handler: the kernel would drop the signal, so it is killed.
    client.call("SignalProcess", &signal("", 15)).expect("sent");
    assert_eq!(client.wait("c1", ""), 128 + 9);
}

#[test]
fn test_remove_container_when_it_runs_then_everything_of_it_is_gone() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let root = agent.rootfs("root");
    let volume = agent.directory.path().join("volume").display().to_string();
    let mut request = container("c1", &root, process(&["sh", "-c", "sleep 1000 & sleep 1000"]));
    request.storages = vec![grpc::Storage {
        driver: "ephemeral".into(),
        mount_point: volume.clone(),
        options: vec!["size=64k".into()],
        ..Default::default()
    }];
    client.create_and_start(&request).expect("started");
    let is_mounted = || std::fs::read_to_string("/proc/mounts").expect("readable").contains(&volume);
    assert!(is_mounted());
    let remove = grpc::RemoveContainerRequest { container_id: "c1".into(), timeout: 0 };
    client.call("RemoveContainer", &remove).expect("removed");
    assert!(!is_mounted());
    let group = request.oci.and_then(|spec| spec.linux).expect("linux").cgroups_path;
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        assert!(!std::path::Path::new(&format!("{root}{group}")).exists());
    }
    let error = client.call("RemoveContainer", &remove).expect_err("gone");
    assert_eq!(error.message, "Invalid container id c1");
}

#[test]
fn test_requests_when_names_are_unknown_then_codes_as_specified() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let start = grpc::StartContainerRequest { container_id: "c1".into() };
    let error = client.call("StartContainer", &start).expect_err("unknown");
    assert_eq!((error.code, error.message.as_str()), (code(Code::Internal), "Invalid container id c1"));
    let wait =
        |exec_id: &str| grpc::WaitProcessRequest { container_id: "c1".into(), exec_id: exec_id.into() };
    assert_eq!(
        client.call("WaitProcess", &wait("c1")).expect_err("unknown").code,
        code(Code::InvalidArgument)
    );
    client.create_and_start(&container("c1", &agent.rootfs("root"), process(&SLEEP))).expect("started");
    assert_eq!(client.call("WaitProcess", &wait("e1")).expect_err("unknown").code, code(Code::NotFound));
    let error = client.call("StartContainer", &start).expect_err("twice");
    assert_eq!(error.code, code(Code::FailedPrecondition));
    let without_spec = grpc::CreateContainerRequest { container_id: "c2".into(), ..Default::default() };
    assert!(client.call("CreateContainer", &without_spec).expect_err("no spec").message.contains("EINVAL"));
}

#[test]
fn test_create_container_when_there_is_no_sandbox_then_refused() {
    if !can_run() {
        return;
    }
    let agent = Agent::start();
    let request = container("c1", &agent.rootfs("root"), process(&SLEEP));
    let error = agent.connect().call("CreateContainer", &request).expect_err("no sandbox");
    assert_eq!(error.code, code(Code::FailedPrecondition));
}

#[test]
fn test_mounts_when_the_image_has_links_then_they_lead_nowhere_outside() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let (root, outside) = (agent.rootfs("root"), agent.directory.path().join("outside"));
    std::fs::create_dir(&outside).expect("made");
    std::os::unix::fs::symlink(&outside, root.join("escape")).expect("linked");
    let file = agent.directory.path().join("resolv.conf");
    std::fs::write(&file, "nameserver 1.2.3.4\n").expect("written");
    std::os::unix::fs::symlink("../../../../../../../etc/hostile", root.join("etc/resolv.conf"))
        .expect("linked");
    let mut request = container("c1", &root, process(&["cat", "/etc/resolv.conf"]));
    let spec = request.oci.as_mut().expect("has a spec");
    spec.mounts.push(mount("/escape/made", "tmpfs", "tmpfs", &[]));
    let error = client.call("CreateContainer", &request).err();
    assert!(!outside.join("made").exists(), "{error:?}");
    let spec = request.oci.as_mut().expect("has a spec");
    spec.mounts.pop();
    spec.mounts.push(mount("/etc/resolv.conf", "bind", &file.display().to_string(), &["bind", "ro"]));
    drop(client.call("CreateContainer", &request));
    assert!(!std::path::Path::new("/etc/hostile").exists());
    // A link where /proc shall be is refused.
    let linked = agent.rootfs("linked");
    std::os::unix::fs::symlink("tmp", linked.join("proc")).expect("linked");
    let error =
        client.call("CreateContainer", &container("c2", &linked, process(&SLEEP))).expect_err("refused");
    assert!(error.message.starts_with("open directory /proc: ENOTDIR"), "{}", error.message);
}

#[test]
fn test_pause_when_running_then_no_process_goes_on_until_resumed() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    let script = ["sh", "-c", "while read line; do echo $line; done"];
    client.create_and_start(&container("c1", &agent.rootfs("root"), process(&script))).expect("started");
    let pause = grpc::PauseContainerRequest { container_id: "c1".into() };
    let resume = grpc::ResumeContainerRequest { container_id: "c1".into() };
    if client.call("PauseContainer", &pause).is_err_and(|error| error.message.contains("cgroup")) {
        eprintln!("SKIPPED: no cgroup version 2 here");
        return;
    }
    assert_eq!(
        client.call("PauseContainer", &pause).expect_err("twice").code,
        code(Code::FailedPrecondition)
    );
    let write =
        grpc::WriteStreamRequest { container_id: "c1".into(), data: b"a\n".to_vec(), ..Default::default() };
    client.call("WriteStdin", &write).expect("into the pipe");
    let read = grpc::ReadStreamRequest { container_id: "c1".into(), exec_id: "c1".into(), len: 10 };
    let pending = client.send("ReadStdout", &read);
    client.check().expect("serving");
    assert!(!client.answer_order().contains(&pending));
    client.call("ResumeContainer", &resume).expect("resumed");
    assert_eq!(
        client.call("ResumeContainer", &resume).expect_err("twice").code,
        code(Code::FailedPrecondition)
    );
    let answer = client.receive(pending).expect("read");
    assert_eq!(grpc::ReadStreamResponse::decode(&answer[..]).expect("decodes").data, b"a\n");
    client
        .call("CloseStdin", &grpc::CloseStdinRequest { container_id: "c1".into(), ..Default::default() })
        .expect("closed");
    assert_eq!(client.wait("c1", ""), 0);
    let answer = client
        .call("StatsContainer", &grpc::StatsContainerRequest { container_id: "c1".into() })
        .expect("stats");
    let stats = grpc::StatsContainerResponse::decode(&answer[..]).expect("decodes");
    assert!(stats.cgroup_stats.and_then(|stats| stats.cpu_stats).is_some());
}

#[test]
fn test_sandbox_pid_namespace_when_shared_then_second_container_sees_the_first() {
    if !can_run() {
        return;
    }
    let (agent, mut client) = Agent::with_sandbox();
    client.create_and_start(&container("c1", &agent.rootfs("one"), process(&SLEEP))).expect("started");
    let mut second = container("c2", &agent.rootfs("two"), process(&["cat", "/proc/1/comm"]));
    second.sandbox_pidns = true;
    client.create_and_start(&second).expect("started");
    assert_eq!(client.read_all("ReadStdout", "c2", ""), b"sleep\n");
    client
        .create_and_start(&container("c3", &agent.rootfs("three"), process(&["sh", "-c", "echo $$"])))
        .expect("started");
    assert_eq!(client.read_all("ReadStdout", "c3", ""), b"1\n", "later containers have their own again");
}

#[test]
fn test_destroy_sandbox_when_containers_run_then_agent_ends() {
    if !can_run() {
        return;
    }
    let (mut agent, mut client) = Agent::with_sandbox();
    client.create_and_start(&container("c1", &agent.rootfs("root"), process(&SLEEP))).expect("started");
    client.call("DestroySandbox", &grpc::DestroySandboxRequest {}).expect("destroyed");
    drop(client);
    assert_eq!(agent.wait(), Some(0));
}

#[test]
fn test_every_rpc_when_not_served_then_unimplemented() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let served = [
        "CreateContainer",
        "StartContainer",
        "RemoveContainer",
        "ExecProcess",
        "SignalProcess",
        "WaitProcess",
        "UpdateContainer",
        "StatsContainer",
        "PauseContainer",
        "ResumeContainer",
        "WriteStdin",
        "ReadStdout",
        "ReadStderr",
        "CloseStdin",
        "TtyWinResize",
        "CreateSandbox",
        "DestroySandbox",
        "GetGuestDetails",
    ];
    let others =
        RPCS.iter().filter(|(service, method)| *service == AGENT_SERVICE && !served.contains(method));
    for (_, method) in others {
        let error = client.call(method, &grpc::Empty {}).expect_err(method);
        assert_eq!(error.code, code(Code::Unimplemented), "{method}");
    }
    let unknown =
        client.try_call("grpc.Nothing", "Check", &grpc::Empty {}).expect("sent").expect_err("unknown");
    assert_eq!(unknown.message, "grpc.Nothing service does not exist");
}

#[test]
fn test_await_device_when_slot_is_empty_then_gone_at_once_and_its_coming_times_out() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let request = AwaitDeviceRequest {
        subsystem: "block".into(),
        pci_path: "1e/1e/1e".into(),
        gone: true,
        timeout_ms: 10_000,
    };
    client.try_call(DEVICE_SERVICE, "AwaitDevice", &request).expect("sent").expect("is gone");
    let request = AwaitDeviceRequest { gone: false, timeout_ms: 20, ..request };
    let error = client.try_call(DEVICE_SERVICE, "AwaitDevice", &request).expect("sent").expect_err("absent");
    assert_eq!(error.code, code(Code::DeadlineExceeded), "{}", error.message);
    let error = client.try_call(DEVICE_SERVICE, "Nothing", &request).expect("sent").expect_err("unknown");
    assert_eq!(error.code, code(Code::Unimplemented));
}

#[test]
fn test_health_when_asked_then_serving_and_versions() {
    let agent = Agent::start();
    let mut client = agent.connect();
    assert_eq!(client.check().expect("serving"), [0x08, 1]);
    let answer = client
        .try_call("grpc.Health", "Version", &grpc::CheckRequest::default())
        .expect("sent")
        .expect("versions");
    let versions = grpc::VersionCheckResponse::decode(&answer[..]).expect("decodes");
    assert_eq!(versions.grpc_version, "0.0.1");
}

#[test]
fn test_echo_when_called_then_the_request_comes_back() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let message = grpc::StringUser { uid: "x".repeat(70_000), ..Default::default() };
    let answer = client.try_call("casemate.Diagnostics", "Echo", &message).expect("sent").expect("answers");
    assert_eq!(answer, message.encode_to_vec());
    let unknown =
        client.try_call("casemate.Diagnostics", "Nope", &message).expect("sent").expect_err("unknown");
    assert_eq!(unknown.code, code(Code::Unimplemented));
}
