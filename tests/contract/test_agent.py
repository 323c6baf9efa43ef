"""What the guest's agent keeps to: the model of it in the fake VMM, and the real one in a guest (one boot for all tests)."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casemate import CommandError, Container, ContainerConfig, Sandbox, SandboxConfig, Settings, State
from casemate.agent import messages
from casemate.errors import AgentRpcError, DeadlineExceededError
from tests.support.fake_vm import make_fake_vm

pytestmark = pytest.mark.timeout(120)

INVALID, NOT_FOUND, EXISTS, PRECONDITION, UNIMPLEMENTED, INTERNAL = 3, 5, 6, 9, 12, 13


@pytest.fixture(
    scope="module",
    params=["fake", pytest.param("real", marks=[pytest.mark.qemu, pytest.mark.root, pytest.mark.busybox])],
)
def sandbox(request: pytest.FixtureRequest, _fake_vm_directory: Path, cache_root: Path) -> Iterator[Sandbox]:
    root = Path(tempfile.mkdtemp(prefix="cm-", dir="/tmp"))
    vm = make_fake_vm(_fake_vm_directory, _fake_vm_directory / "cache", root, root / "asked.jsonl")
    if request.param == "fake":
        config, container, settings = vm.config("contract"), vm.container(), vm.settings
    else:
        image = f"oci:{request.getfixturevalue('busybox_image')}"
        config, container = SandboxConfig(), ContainerConfig(name="main", image=image, command=("cat",))
        settings = Settings(state_root=root, cache_root=cache_root, timeout_factor=vm.settings.timeout_factor)
    with Sandbox.create(config, containers=(container,), start=True, settings=settings) as sandbox:
        yield sandbox
    shutil.rmtree(root)


@pytest.fixture
def main(sandbox: Sandbox) -> Container:
    return sandbox.container("main")


def refused(call: Callable[[], Any]) -> int:
    with pytest.raises(AgentRpcError) as caught:
        call()
    return caught.value.code


def test_details_then_order_is_announced_and_memory_blocks_are_a_power_of_two(sandbox: Sandbox) -> None:
    block = sandbox.guest.mem_block_size_bytes

    assert block & (block - 1) == 0
    assert sandbox.guest.agent_details is not None
    assert "casemate.ordered" in sandbox.guest.agent_details.extra_features


def test_health_then_is_serving(sandbox: Sandbox) -> None:
    connection = sandbox._running_agent("test").connection

    assert b"SERVING" in connection.submit("grpc.Health", "Check", b"{}", 30).result().upper()


def test_create_when_sandbox_or_container_is_there_then_exists(sandbox: Sandbox, main: Container) -> None:
    agent = sandbox._running_agent("test")
    spec = messages.Spec(process=main.process_spec, root=messages.Root(path="/"), linux=messages.LinuxSpec())
    again = messages.CreateContainerRequest(container_id="main", exec_id="main", spec=spec)

    assert refused(lambda: agent.call("CreateContainer", again)) == EXISTS
    assert refused(lambda: agent.call("CreateSandbox", messages.CreateSandboxRequest())) == EXISTS


def test_container_when_it_runs_already_or_is_unknown_then_start_is_refused(sandbox: Sandbox) -> None:
    agent = sandbox._running_agent("test")

    def start(name: str) -> int:
        return refused(lambda: agent.call("StartContainer", messages.ContainerRequest(container_id=name)))

    assert (start("main"), start("nobody")) == (PRECONDITION, INTERNAL)


def test_process_when_unknown_then_its_code_tells_container_from_process(sandbox: Sandbox) -> None:
    agent = sandbox._running_agent("test")

    def wait(container: str, process: str) -> int:
        request = messages.WaitProcessRequest(container_id=container, exec_id=process)
        return refused(lambda: agent.call("WaitProcess", request))

    assert (wait("nobody", "x"), wait("main", "nobody")) == (INVALID, NOT_FOUND)


def test_method_when_not_served_then_unimplemented(sandbox: Sandbox) -> None:
    agent = sandbox._running_agent("test")

    assert refused(lambda: agent.call("ListRoutes", messages.DestroySandboxRequest())) == UNIMPLEMENTED


@pytest.mark.parametrize(
    ("script", "status", "stdout", "stderr"),
    [
        ("exit 0", 0, "", ""),
        ("exit 7", 7, "", ""),
        ("echo out; echo err >&2; exit 3", 3, "out\n", "err\n"),
    ],
)
def test_exec_then_status_and_both_outputs_are_told(
    main: Container, script: str, status: int, stdout: str, stderr: str
) -> None:
    result = main.exec(["sh", "-c", script], capture=True)

    assert (result.exit_code, result.stdout, result.stderr) == (status, stdout, stderr)


@pytest.mark.parametrize(("command", "status"), [("nope", 127), ("/nope", 127), ("/etc/passwd", 126)])
def test_exec_when_it_cannot_be_executed_then_the_cause_is_told(
    main: Container, command: str, status: int
) -> None:
    with pytest.raises(CommandError) as caught:
        main.exec([command])

    assert caught.value.exit_code == status


def test_exec_when_env_and_directory_are_given_then_the_process_has_them(main: Container) -> None:
    assert "B=2" in main.exec(["env"], env={"B": "2"}, capture=True).stdout.splitlines()
    assert main.exec(["pwd"], cwd="/tmp", capture=True).stdout == "/tmp\n"


def test_stdin_when_a_megabyte_is_echoed_and_closed_then_all_of_it_comes_back(main: Container) -> None:
    data = bytes(range(256)) * 4096

    assert main.exec(["cat"], input=data, capture=True).stdout_bytes == data


def test_stdin_when_closed_then_outputs_go_on_and_another_write_is_refused(main: Container) -> None:
    process = main.exec(["cat"])
    process.stdin.write(b"one")
    process.stdin.close()
    process.stdin.close()

    assert process.stdout.read_all() == b"one"
    assert process.wait(30) == 0
    agent = process._agent
    assert refused(agent.submit_write_stdin("main", process.exec_id, b"x").result) == INTERNAL


def test_read_when_less_is_asked_for_then_the_rest_stays(main: Container) -> None:
    process = main.exec(["sh", "-c", "echo 123456"])
    agent = process._agent

    pieces = [agent.submit_read("main", process.exec_id, 4, stderr=False).result() for _ in range(3)]

    assert pieces == [b"1234", b"56\n", b""]
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, 137), (signal.SIGINT, 130)]
)
def test_signal_when_the_process_has_no_handler_then_it_ends_by_it(
    main: Container, number: int, status: int
) -> None:
    process = main.exec(["sleep", "1000"])

    process.signal(number)

    assert process.wait(30) == status
    process.signal(number)
    assert process.wait(0) == status


def test_wait_when_the_process_runs_then_the_deadline_passes(main: Container) -> None:
    process = main.exec(["sleep", "1000"])
    started = time.monotonic()

    with pytest.raises(DeadlineExceededError):
        process.wait(0.1)

    assert time.monotonic() - started >= 0.1
    process.signal(signal.SIGKILL)
    assert process.wait(30) == 137


def test_pause_when_input_comes_then_it_is_read_only_after_resume(main: Container) -> None:
    process = main.exec(["cat"])
    process.stdin.write(b"before")
    assert process.stdout.read() == b"before"

    main.pause()
    process.stdin.submit(b"after")
    read = process.stdout.prefetch()
    assert process._agent.wait_any([read], 0.2) == []
    main.resume()

    assert process.stdout.read() == b"after"
    process.stdin.close()
    assert process.wait(30) == 0


def test_pause_when_it_is_paused_then_refused(sandbox: Sandbox, main: Container) -> None:
    agent = sandbox._running_agent("test")
    request = messages.ContainerRequest(container_id="main")

    assert refused(lambda: agent.call("ResumeContainer", request)) == PRECONDITION
    main.pause()
    assert refused(lambda: agent.call("PauseContainer", request)) == PRECONDITION
    main.resume()
    assert main.state is State.RUNNING


def test_terminal_then_has_one_output_and_a_size(main: Container) -> None:
    process = main.exec(["cat"], terminal=True)

    process.resize(30, 100)

    assert process.stderr is None
    process.signal(signal.SIGKILL)
    assert process.wait(30) == 137
    agent = process._agent
    assert refused(agent.submit_read("main", process.exec_id, 1, stderr=True).result) == INTERNAL


def test_stats_then_time_and_memory_are_counted(main: Container) -> None:
    stats = main.stats()

    assert stats.cpu_stats is not None
    assert stats.cpu_stats.cpu_usage is not None
    assert stats.cpu_stats.cpu_usage.total_usage > 0
    assert stats.memory_stats is not None
    assert stats.pids_stats is not None
    assert stats.pids_stats.current >= 1


def test_container_when_hot_plugged_then_lives_and_its_removal_kills_what_runs(
    sandbox: Sandbox, main: Container
) -> None:
    second = sandbox.create_container(
        ContainerConfig(name="second", image=main.image_digest, command=("cat",))
    )
    assert second.state is State.READY
    second.start()
    process = second.exec(["sleep", "1000"])
    waits = process.submit_wait()

    second.remove()

    assert b"137" in waits.result()
    assert [one.id for one in sandbox.containers] == ["main"]
    agent = sandbox._running_agent("test")
    request = messages.RemoveContainerRequest(container_id="second")
    assert refused(lambda: agent.call("RemoveContainer", request)) == INTERNAL


def test_first_process_when_terminated_without_a_handler_then_it_is_killed(
    sandbox: Sandbox, main: Container
) -> None:
    third = sandbox.create_container(ContainerConfig(name="third", image=main.image_digest, command=("cat",)))
    third.start()

    third.kill(signal.SIGTERM)

    assert third.wait(30) == 137
    assert third.state is State.STOPPED
    third.remove()
