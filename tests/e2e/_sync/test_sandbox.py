# Made by scripts/unasync.py from tests/e2e/_async/test_sandbox.py; do not edit.
"""One sandbox through its whole life, on both faces."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from casemate import (
    AlreadyExistsError,
    Sandbox,
    CommandError,
    ContainerConfig,
    DeadlineExceededError,
    InvalidStateError,
    NotFoundError,
    ResourceExhaustedError,
    SandboxConfig,
    Settings,
    State,
    run,
)

pytestmark = [pytest.mark.root, pytest.mark.qemu]


def looping(image: str, name: str = "main") -> ContainerConfig:
    """A container whose first process waits for its input to end."""
    return ContainerConfig(name=name, image=image, command=("cat",))


def test_run_when_command_writes_then_output_and_status_are_its_own(
    busybox: str, settings: Settings
) -> None:
    result = run(
        busybox,
        ["sh", "-c", "cat; echo $GREETING; id -u; pwd; echo err >&2; exit 7"],
        env={"GREETING": "hello"},
        user="1000:1000",
        cwd="/tmp",
        input="in\n",
        settings=settings,
    )
    assert (result.exit_code, result.stdout, result.stderr) == (7, "in\nhello\n1000\n/tmp\n", "err\n")
    names = [phase.name for phase in result.timings]
    assert names[:2] == ["plan", "vmm_spawn"]
    assert {"kernel", "agent", "sandbox", "container", "first_byte", "teardown"} <= set(names)
    assert not list((settings.state_root / "sandboxes").iterdir())


def test_sandbox_when_used_then_every_operation_is_seen_in_the_guest(
    busybox: str, settings: Settings
) -> None:
    config = SandboxConfig(name="whole", hostname="inside")
    with Sandbox.create(
        config, containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        assert sandbox.state is State.RUNNING
        assert sandbox.agent_url.startswith("hvsock://")
        container = sandbox.container()
        assert (container.exec(["hostname"], capture=True)).stdout == "inside\n"

        process = container.exec(["sh", "-c", "read x; echo got $x; exec sleep 1000"])
        process.stdin.write(b"ping\n")
        assert process.stdout.read() == b"got ping\n"
        with pytest.raises(DeadlineExceededError):
            process.wait(0.2)
        process.signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert process.wait() == 128 + signal.SIGTERM

        stats = container.stats()
        assert stats.memory_stats is not None and stats.memory_stats.usage is not None
        assert stats.memory_stats.usage.usage > 0
        assert stats.pids_stats is not None and stats.pids_stats.current >= 1

        container.pause()
        assert container.state is State.PAUSED
        with pytest.raises(InvalidStateError):
            container.exec(["true"])
        container.resume()
        assert (container.exec(["true"], capture=True)).exit_code == 0

        sandbox.pause()
        sandbox.resume()

        container.process.stdin.close()
        assert container.wait(30) == 0
        assert container.state is State.STOPPED
        container.remove()
        assert sandbox.containers == ()
    assert sandbox.state is State.STOPPED
    sandbox.close()


def test_process_when_it_has_a_terminal_then_size_and_echo_are_real(
    busybox: str, settings: Settings
) -> None:
    container = ContainerConfig(
        image=busybox,
        command=("sh", "-c", "test -t 0 && test -t 1 && echo tty; read x; stty size"),
        terminal=True,
    )
    with Sandbox.create(containers=(container,), start=True, settings=settings) as sandbox:
        process = sandbox.container().process
        assert process.stderr is None
        process.resize(33, 77)
        process.stdin.write(b"go\n")
        output = process.stdout.read_all()
        assert b"tty\r\n" in output
        assert b"33 77\r\n" in output
        assert process.wait() == 0


def test_create_container_when_sandbox_runs_then_its_image_is_hot_plugged_and_taken_away(
    busybox: str, settings: Settings
) -> None:
    with Sandbox.create(settings=settings) as sandbox:
        for name in ("one", "two"):
            container = sandbox.create_container(looping(busybox, name))
            container.start()
            assert (container.exec(["echo", name], capture=True)).stdout == f"{name}\n"
        with pytest.raises(AlreadyExistsError):
            sandbox.create_container(looping(busybox, "one"))
        assert [one.id for one in sandbox.inspect().containers] == ["one", "two"]
        sandbox.container("one").remove()
        assert [one.id for one in sandbox.inspect().containers] == ["two"]
        with pytest.raises(NotFoundError):
            sandbox.container("one")
        again = sandbox.create_container(looping(busybox, "one"))
        again.start()


def test_create_container_when_no_port_is_left_then_refused_and_the_sandbox_lives(
    busybox: str, settings: Settings
) -> None:
    with Sandbox.create(SandboxConfig(hotplug_ports=1), settings=settings) as sandbox:
        sandbox.create_container(looping(busybox, "one"))
        with pytest.raises(ResourceExhaustedError):
            sandbox.create_container(looping(busybox, "two"))
        sandbox.container("one").remove()
        sandbox.create_container(looping(busybox, "three"))


@pytest.mark.parametrize(("command", "exit_code"), [("/nope", 127), ("nope", 127), ("/etc/passwd", 126)])
def test_start_when_command_cannot_be_executed_then_exit_code_is_that_of_a_shell(
    busybox: str, settings: Settings, command: str, exit_code: int
) -> None:
    with pytest.raises(CommandError) as caught:
        run(busybox, [command], settings=settings)
    assert (caught.value.exit_code, caught.value.command) == (exit_code, command)
    assert not list((settings.state_root / "sandboxes").iterdir())


def test_exec_when_command_is_unknown_then_the_container_goes_on(
    busybox: str, settings: Settings
) -> None:
    with Sandbox.create(
        containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        container = sandbox.container()
        with pytest.raises(CommandError) as caught:
            container.exec(["nope"])
        assert caught.value.exit_code == 127
        with pytest.raises(DeadlineExceededError):
            container.exec(["sleep", "1000"], capture=True, timeout_s=0.3)
        with pytest.raises(ResourceExhaustedError):
            container.exec(["cat", "/dev/zero"], capture=True, limit_bytes=1 << 20)
        assert (container.exec(["echo", "on"], capture=True)).stdout == "on\n"


def test_exec_when_a_megabyte_goes_both_ways_then_it_comes_back_whole(
    busybox: str, settings: Settings
) -> None:
    data = bytes(range(256)) * 8192
    with Sandbox.create(
        containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        result = sandbox.container().exec(["cat"], capture=True, input=data)
        assert result.stdout_bytes == data


def test_attach_when_another_owns_the_sandbox_then_exec_works_and_closing_leaves_it(
    busybox: str, settings: Settings
) -> None:
    with Sandbox.create(
        SandboxConfig(name="shared"), containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        with Sandbox.attach("shared", settings=settings) as other:
            assert (other.container().exec(["echo", "there"], capture=True)).stdout == "there\n"
            with pytest.raises(InvalidStateError):
                other.create_container(looping(busybox, "more"))
        assert (sandbox.container().exec(["echo", "still"], capture=True)).stdout == "still\n"
    with pytest.raises(NotFoundError):
        Sandbox.attach("shared", settings=settings)


def test_create_when_name_is_taken_then_the_first_is_left_alone(
    busybox: str, settings: Settings
) -> None:
    config = SandboxConfig(name="twice")
    with Sandbox.create(config, settings=settings) as sandbox:
        with pytest.raises(AlreadyExistsError):
            Sandbox.create(config, settings=settings)
        assert sandbox.inspect().id == "twice"
        assert Path(f"/proc/{sandbox.vmm_pid}").exists()
