"""Detached sandboxes: made by one process, used and ended by others, whoever dies in between."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from casemate import (
    AsyncSandbox,
    ContainerConfig,
    DeadlineExceededError,
    InvalidStateError,
    NotFoundError,
    Sandbox,
    SandboxConfig,
    Settings,
    State,
    UnsupportedError,
)
from casemate.keeper.client import KeeperClient
from casemate.observe import failpoints
from casemate.persist.outcome import read_end, read_exits
from casemate.persist.store import is_owned, load_record, sandboxes_root

pytestmark = [pytest.mark.root, pytest.mark.qemu]

NAME = "apart"

CREATOR = """
import sys
from casemate import ContainerConfig, Sandbox, SandboxConfig
image, name, command = sys.argv[1:]
container = ContainerConfig(name="main", image=image, command=("sh", "-c", command))
with Sandbox.create(SandboxConfig(name=name), containers=(container,), start=True, detached=True) as sandbox:
    assert sandbox.state.value == "running"
"""


def shell(image: str, script: str, name: str = "main") -> ContainerConfig:
    return ContainerConfig(name=name, image=image, command=("sh", "-c", script))


def create_elsewhere(image: str, script: str = "cat", **environment: str) -> int:
    """Make a detached sandbox in a process that is gone then; its exit status."""
    words = [sys.executable, "-c", CREATOR, image, NAME, script]
    return subprocess.run(words, env=os.environ | environment, timeout=240).returncode


def wait_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 60)[0]
    finally:
        os.close(fd)


def casemate(*words: str, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([sys.executable, "-m", "casemate", *words], capture_output=True, timeout=240)
    assert done.returncode == status, done.stderr.decode()
    return done


@pytest.fixture(autouse=True)
def _ended(settings: Settings) -> Iterator[None]:
    """A test that fails leaves no machine."""
    yield
    if is_owned(settings, NAME):
        casemate("rm", "--force", NAME)
    Sandbox.cleanup(NAME, settings=settings)


def files_of(settings: Settings) -> list[Path]:
    root = sandboxes_root(settings)
    return list(root.iterdir()) if root.exists() else []


def test_attach_when_the_creator_is_gone_then_all_is_there_and_it_is_ended_from_here(
    busybox: str, settings: Settings
) -> None:
    assert create_elsewhere(busybox, "echo early; echo oops >&2; read line; echo got $line; exit 3") == 0
    record = load_record(settings, NAME)
    assert record.keeper == record.owner
    pids = kept_pids(settings)
    with Sandbox.attach(NAME, settings=settings) as sandbox:
        main = sandbox.container()
        assert main.exec(["cat", "/proc/1/comm"], capture=True).stdout == "sh\n"
        with pytest.raises(InvalidStateError, match="casemate logs"):
            main.process.stdout.read()
        with pytest.raises(UnsupportedError):
            sandbox.create_container(shell(busybox, "true", "late"))
        sandbox.pause()
        assert load_record(settings, NAME).state is State.PAUSED
        sandbox.resume()
    # Nobody is attached: the keeper goes on reading.
    with Sandbox.attach(NAME, settings=settings) as sandbox:
        sandbox.container().process.stdin.write(b"word\n")
    with Sandbox.attach(NAME, settings=settings) as sandbox:
        entries = list(sandbox.logs(follow=True))
        assert b"".join(one.data for one in entries if one.stream == "stdout") == b"early\ngot word\n"
        assert b"".join(one.data for one in entries if one.stream == "stderr") == b"oops\n"
        assert [one.data for one in sandbox.logs(tail=1)] == [b"got word\n"]
        assert [one.data for one in sandbox.logs(since_s=entries[-1].time_unix_ns / 1e9 - 0.001)] == [
            b"got word\n"
        ]
        assert sandbox.container().wait() == 3
    assert read_exits(sandboxes_root(settings) / NAME)["main"].status == 3
    with Sandbox.attach(NAME, settings=settings) as sandbox:
        assert (sandbox.container().state, sandbox.container().process.exit_code) == (State.STOPPED, 3)
        sandbox.stop()
        sandbox.stop()
    assert files_of(settings) == []
    with pytest.raises(NotFoundError):
        Sandbox.attach(NAME, settings=settings)
    for pid in pids:
        wait_end(pid)


async def test_create_when_detached_on_a_loop_then_closing_leaves_it_and_another_handle_ends_it(
    busybox: str, settings: Settings
) -> None:
    async with await AsyncSandbox.create(
        SandboxConfig(name=NAME),
        containers=(shell(busybox, "echo one; sleep 1000"),),
        start=True,
        detached=True,
        settings=settings,
    ) as sandbox:
        assert (await sandbox.container().exec(["echo", "here"], capture=True)).stdout == "here\n"
        async for entry in sandbox.logs(follow=True):
            assert entry.data == b"one\n"
            break
    assert is_owned(settings, NAME)
    other = await AsyncSandbox.attach(NAME, settings=settings)
    await other.container().kill()
    assert [entry.data async for entry in other.logs(follow=True)] == [b"one\n"]
    assert await other.container().wait() == 137
    await other.stop()
    assert files_of(settings) == []


def test_attach_when_two_use_it_at_once_then_both_are_served_and_the_document_has_both_changes(
    busybox: str, settings: Settings
) -> None:
    names = ("one", "two")
    with (
        Sandbox.create(
            SandboxConfig(name=NAME),
            containers=[shell(busybox, f"echo {name}; cat", name) for name in names],
            detached=True,
            settings=settings,
        ),
        ThreadPoolExecutor(2) as pool,
    ):

        def use(name: str) -> str:
            with Sandbox.attach(NAME, settings=settings) as sandbox:
                container = sandbox.container(name)
                container.start()
                said = next(iter(sandbox.logs(name, follow=True))).data
                container.kill()
                container.wait()
                return said.decode()

        assert list(pool.map(use, names)) == ["one\n", "two\n"]
        record = load_record(settings, NAME)
        assert [(one.id, one.state, one.exit_code) for one in record.containers] == [
            ("one", State.STOPPED, 137),
            ("two", State.STOPPED, 137),
        ]
    with Sandbox.attach(NAME, settings=settings) as first, Sandbox.attach(NAME, settings=settings) as second:
        first.container("one").remove()
        assert [one.id for one in load_record(settings, NAME).containers] == ["two"]
        # Both end it: one does the work, the other finds it done.
        ending = ThreadPoolExecutor(2)
        list(ending.map(lambda one: one.stop(), (first, second)))
        ending.shutdown()
    assert files_of(settings) == []


def test_pause_when_another_process_has_qemu_then_the_error_names_it(
    busybox: str, settings: Settings
) -> None:
    assert create_elsewhere(busybox) == 0
    directory = sandboxes_root(settings) / NAME
    with (
        Sandbox.attach(NAME, settings=settings) as sandbox,
        KeeperClient.connect(directory, NAME) as other,
    ):
        assert sandbox._kept is not None
        other.request("turn", timeout_s=10, at="qmp")
        sandbox._kept._timeouts = sandbox._timeouts.scaled(0.05)
        with pytest.raises(DeadlineExceededError, match=f"process {os.getpid()} has used the qmp"):
            sandbox.pause()
        other.close()
        sandbox.pause()
        sandbox.resume()
        sandbox.stop()


# Where the creator is killed, and whether the sandbox is complete then.
MOMENTS = {
    "keeper.spawn=kill": False,
    "keeper.recorded=kill": False,
    "qemu.spawned=kill": False,
    "store.rename=2*off->kill": False,
    "agent.create_sandbox.before=kill": False,
    "agent.start_container.after=kill": False,
    "keeper.keep=kill": False,
    "keeper.commit=kill": False,
    "keeper.committed=kill": True,
}


@pytest.mark.parametrize("setting", MOMENTS)
def test_create_when_the_creator_is_killed_then_the_sandbox_is_complete_or_a_dead_one(
    busybox: str, settings: Settings, setting: str
) -> None:
    assert create_elsewhere(busybox, CASEMATE_FAILPOINTS=setting) == -signal.SIGKILL
    assert is_owned(settings, NAME) is MOMENTS[setting]
    alive = {info.id: info.alive for info in Sandbox.list(settings=settings)}
    assert alive == {NAME: MOMENTS[setting]}
    casemate("stop" if MOMENTS[setting] else "cleanup", NAME)
    assert files_of(settings) == []
    assert str(settings.state_root) not in Path("/proc/net/unix").read_text()


def kept_pids(settings: Settings) -> tuple[int, int]:
    """Process ids of the keeper and of the VMM."""
    record = load_record(settings, NAME)
    assert record.keeper is not None
    assert record.vmm is not None
    return record.keeper.pid, record.vmm.pid


def test_keeper_when_killed_then_the_vmm_ends_attach_says_so_and_cleanup_removes_all(
    busybox: str, settings: Settings
) -> None:
    assert create_elsewhere(busybox) == 0
    keeper_pid, vmm_pid = kept_pids(settings)
    os.kill(keeper_pid, signal.SIGKILL)
    wait_end(vmm_pid)
    with pytest.raises(InvalidStateError, match="is dead .its keeper was killed; `casemate cleanup apart`"):
        Sandbox.attach(NAME, settings=settings)
    assert casemate("cleanup", "--all").stdout == b"apart\n"
    assert files_of(settings) == []


def test_vmm_when_killed_while_nobody_is_attached_then_the_record_names_the_cause_and_logs_stay(
    busybox: str, settings: Settings
) -> None:
    assert create_elsewhere(busybox, "echo said; cat") == 0
    keeper_pid, vmm_pid = kept_pids(settings)
    with Sandbox.attach(NAME, settings=settings) as sandbox:
        assert next(iter(sandbox.logs(follow=True))).data == b"said\n"
    os.kill(vmm_pid, signal.SIGKILL)
    wait_end(keeper_pid)
    directory = sandboxes_root(settings) / NAME
    end = read_end(directory)
    assert end is not None
    assert (end.status, end.wanted, end.problems) == (-signal.SIGKILL, False, ())
    assert len(end.console_tail) <= 16 << 10
    assert read_exits(directory)["main"].cause == "vmm_ended"
    with pytest.raises(InvalidStateError, match="its VMM was ended by signal 9"):
        Sandbox.attach(NAME, settings=settings)
    assert casemate("logs", "-f", NAME).stdout == b"said\n"
    (row,) = [line for line in casemate("ps").stdout.decode().splitlines() if line.startswith(NAME)]
    assert row.split()[1:3] == ["dead", "detached"]
    casemate("rm", NAME)
    assert files_of(settings) == []


def expect_failure(call: Callable[[], object], kind: type[BaseException]) -> None:
    """In a function of its own: the error holds what was made, and that must be gone next."""
    with pytest.raises(kind):
        call()


@pytest.mark.parametrize("action", ["error(made to fail)", "cancel"])
def test_create_when_a_step_with_the_keeper_fails_then_nothing_stays(
    busybox: str, settings: Settings, action: str
) -> None:
    for point in [name for name in failpoints.POINTS if name.startswith("keeper.")]:
        kind = KeyboardInterrupt if action == "cancel" else failpoints.POINTS[point]
        with failpoints.armed(f"{point}=1*{action}") as hits:
            expect_failure(
                lambda: Sandbox.create(
                    SandboxConfig(name=NAME),
                    containers=(shell(busybox, "cat"),),
                    start=True,
                    detached=True,
                    settings=settings,
                ),
                kind,
            )
            assert hits(point) == 1
        assert files_of(settings) == []


def test_commands_when_a_container_is_created_started_and_watched_then_each_says_what_happens(
    busybox: str, settings: Settings
) -> None:
    script = "echo ready; while read line; do echo $line; done; exit 5"
    made = casemate("create", "--name", NAME, busybox, "--", "sh", "-c", script)
    assert made.stdout == b"apart\n"
    assert b" ready " in casemate("ps").stdout
    assert b"casemate start" in casemate("attach", NAME, status=125).stderr
    container = casemate("start", NAME).stdout.decode().strip()
    assert container == load_record(settings, NAME).containers[0].id
    assert b"no container that waits for its start" in casemate("start", NAME, status=1).stderr
    assert b"stop` or --force" in casemate("rm", NAME, status=1).stderr
    with subprocess.Popen(
        [sys.executable, "-m", "casemate", "attach", "-i", NAME],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as attached:
        assert attached.stdin is not None
        assert attached.stdout is not None
        attached.stdin.write(b"typed\n")
        attached.stdin.flush()
        assert attached.stdout.readline() == b"typed\n"
        attached.send_signal(signal.SIGTERM)
        # The first process of a container has no handler for it: the agent takes the signal that ends it.
        assert attached.wait(60) == 137
    assert casemate("logs", "--tail", "1", NAME).stdout == b"typed\n"
    stamped = casemate("logs", "-t", "--since", "1h", NAME).stdout.decode().splitlines()
    assert [line.split(" ", 1)[1] for line in stamped] == ["stdout: ready", "stdout: typed"]
    assert b"exited (137)" in casemate("ps").stdout
    assert b'"status": 137' in casemate("inspect", NAME).stdout
    assert casemate("rm", "--force", NAME).stdout == b"apart\n"
    assert files_of(settings) == []
