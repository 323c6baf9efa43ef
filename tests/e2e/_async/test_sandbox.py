"""One sandbox through its whole life, on both faces."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from casemate import (
    AlreadyExistsError,
    AsyncSandbox,
    CommandError,
    ContainerConfig,
    DeadlineExceededError,
    InvalidStateError,
    NotFoundError,
    ResourceExhaustedError,
    SandboxConfig,
    Settings,
    State,
    async_run,
)

pytestmark = [pytest.mark.root, pytest.mark.qemu]


def looping(image: str, name: str = "main") -> ContainerConfig:
    """A container whose first process waits for its input to end."""
    return ContainerConfig(name=name, image=image, command=("cat",))


async def test_run_when_command_writes_then_output_and_status_are_its_own(
    busybox: str, settings: Settings
) -> None:
    result = await async_run(
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


async def test_sandbox_when_used_then_every_operation_is_seen_in_the_guest(
    busybox: str, settings: Settings
) -> None:
    config = SandboxConfig(name="whole", hostname="inside")
    async with await AsyncSandbox.create(
        config, containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        assert sandbox.state is State.RUNNING
        assert sandbox.agent_url.startswith("hvsock://")
        container = sandbox.container()
        assert (await container.exec(["hostname"], capture=True)).stdout == "inside\n"

        process = await container.exec(["sh", "-c", "read x; echo got $x; exec sleep 1000"])
        await process.stdin.write(b"ping\n")
        assert await process.stdout.read() == b"got ping\n"
        with pytest.raises(DeadlineExceededError):
            await process.wait(0.2)
        await process.signal(signal.SIGTERM)
        assert await process.wait(30) == 128 + signal.SIGTERM
        assert await process.wait() == 128 + signal.SIGTERM

        stats = await container.stats()
        assert stats.memory_stats is not None and stats.memory_stats.usage is not None
        assert stats.memory_stats.usage.usage > 0
        assert stats.pids_stats is not None and stats.pids_stats.current >= 1

        await container.pause()
        assert container.state is State.PAUSED
        with pytest.raises(InvalidStateError):
            await container.exec(["true"])
        await container.resume()
        assert (await container.exec(["true"], capture=True)).exit_code == 0

        await sandbox.pause()
        await sandbox.resume()

        await container.process.stdin.aclose()
        assert await container.wait(30) == 0
        assert container.state is State.STOPPED
        await container.remove()
        assert sandbox.containers == ()
    assert sandbox.state is State.STOPPED
    await sandbox.aclose()


async def test_process_when_it_has_a_terminal_then_size_and_echo_are_real(
    busybox: str, settings: Settings
) -> None:
    container = ContainerConfig(
        image=busybox,
        command=("sh", "-c", "test -t 0 && test -t 1 && echo tty; read x; stty size"),
        terminal=True,
    )
    async with await AsyncSandbox.create(containers=(container,), start=True, settings=settings) as sandbox:
        process = sandbox.container().process
        assert process.stderr is None
        await process.resize(33, 77)
        await process.stdin.write(b"go\n")
        output = await process.stdout.read_all()
        assert b"tty\r\n" in output
        assert b"33 77\r\n" in output
        assert await process.wait() == 0


async def test_create_container_when_sandbox_runs_then_its_image_is_hot_plugged_and_taken_away(
    busybox: str, settings: Settings
) -> None:
    async with await AsyncSandbox.create(settings=settings) as sandbox:
        for name in ("one", "two"):
            container = await sandbox.create_container(looping(busybox, name))
            await container.start()
            assert (await container.exec(["echo", name], capture=True)).stdout == f"{name}\n"
        with pytest.raises(AlreadyExistsError):
            await sandbox.create_container(looping(busybox, "one"))
        assert [one.id for one in sandbox.inspect().containers] == ["one", "two"]
        await sandbox.container("one").remove()
        assert [one.id for one in sandbox.inspect().containers] == ["two"]
        with pytest.raises(NotFoundError):
            sandbox.container("one")
        again = await sandbox.create_container(looping(busybox, "one"))
        await again.start()


async def test_create_container_when_no_port_is_left_then_refused_and_the_sandbox_lives(
    busybox: str, settings: Settings
) -> None:
    async with await AsyncSandbox.create(SandboxConfig(hotplug_ports=1), settings=settings) as sandbox:
        await sandbox.create_container(looping(busybox, "one"))
        with pytest.raises(ResourceExhaustedError):
            await sandbox.create_container(looping(busybox, "two"))
        await sandbox.container("one").remove()
        await sandbox.create_container(looping(busybox, "three"))


@pytest.mark.parametrize(("command", "exit_code"), [("/nope", 127), ("nope", 127), ("/etc/passwd", 126)])
async def test_start_when_command_cannot_be_executed_then_exit_code_is_that_of_a_shell(
    busybox: str, settings: Settings, command: str, exit_code: int
) -> None:
    with pytest.raises(CommandError) as caught:
        await async_run(busybox, [command], settings=settings)
    assert (caught.value.exit_code, caught.value.command) == (exit_code, command)
    assert not list((settings.state_root / "sandboxes").iterdir())


async def test_exec_when_command_is_unknown_then_the_container_goes_on(
    busybox: str, settings: Settings
) -> None:
    async with await AsyncSandbox.create(
        containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        container = sandbox.container()
        with pytest.raises(CommandError) as caught:
            await container.exec(["nope"])
        assert caught.value.exit_code == 127
        with pytest.raises(DeadlineExceededError):
            await container.exec(["sleep", "1000"], capture=True, timeout_s=0.3)
        with pytest.raises(ResourceExhaustedError):
            await container.exec(["cat", "/dev/zero"], capture=True, limit_bytes=1 << 20)
        assert (await container.exec(["echo", "on"], capture=True)).stdout == "on\n"


async def test_exec_when_a_megabyte_goes_both_ways_then_it_comes_back_whole(
    busybox: str, settings: Settings
) -> None:
    data = bytes(range(256)) * 8192
    async with await AsyncSandbox.create(
        containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        result = await sandbox.container().exec(["cat"], capture=True, input=data)
        assert result.stdout_bytes == data


async def test_attach_when_another_owns_the_sandbox_then_exec_works_and_closing_leaves_it(
    busybox: str, settings: Settings
) -> None:
    async with await AsyncSandbox.create(
        SandboxConfig(name="shared"), containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        async with await AsyncSandbox.attach("shared", settings=settings) as other:
            assert (await other.container().exec(["echo", "there"], capture=True)).stdout == "there\n"
            with pytest.raises(InvalidStateError):
                await other.create_container(looping(busybox, "more"))
        assert (await sandbox.container().exec(["echo", "still"], capture=True)).stdout == "still\n"
    with pytest.raises(NotFoundError):
        await AsyncSandbox.attach("shared", settings=settings)


async def test_create_when_name_is_taken_then_the_first_is_left_alone(
    busybox: str, settings: Settings
) -> None:
    config = SandboxConfig(name="twice")
    async with await AsyncSandbox.create(config, settings=settings) as sandbox:
        with pytest.raises(AlreadyExistsError):
            await AsyncSandbox.create(config, settings=settings)
        assert sandbox.inspect().id == "twice"
        assert Path(f"/proc/{sandbox.vmm_pid}").exists()
