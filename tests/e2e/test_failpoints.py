"""Each step of a start and of an end fails in turn: the first cause is raised, nothing stays, the name is free again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from casemate import (
    AsyncSandbox,
    ContainerConfig,
    HostError,
    Sandbox,
    SandboxConfig,
    Settings,
    VmmExitedError,
)
from casemate.observe import failpoints
from casemate.persist.store import list_records
from tests.support import leaks

pytestmark = [pytest.mark.root, pytest.mark.qemu]

NAME = "swept"
# Passed by an end, also by the one that follows a failed start.
UNDO = (
    "store.remove",
    "qemu.quit",
    "qemu.killed",
    "qemu.close",
    "agent.destroy_sandbox",
    "agent.close",
)
# Passed when a container comes and goes while the sandbox runs.
PLUG = tuple(
    f"{name}{behind}" for name in ("qemu.blockdev_add", "qemu.device_add") for behind in ("", ".after")
)
UNPLUG = ("qemu.device_del", "qemu.device_del.after", "qemu.blockdev_del")
# All steps are swept on a fake VMM (tests/integration/sandbox/test_sweep.py); here those at which a real one differs most.
START_HITS = (
    ("qemu.vsock_backend", ""),
    ("qemu.spawned", ""),
    ("store.rename", "1*off->"),
    ("sandbox.connect", ""),
    ("agent.create_sandbox.before", ""),
    ("agent.create_container.after", ""),
    ("agent.start_container.after", ""),
)
# In the native parts; those that a start passes.
NATIVE = ("native.spawn", "native.send", "native.recv")
WITH_VMM = ("sandbox.connect", "agent.create_container.before", "agent.start_container.after")


@pytest.fixture(autouse=True)
def _no_log_records(caplog: pytest.LogCaptureFixture) -> None:
    """A kept record holds its error, that holds its frames, and those hold what was made."""
    caplog.set_level(logging.CRITICAL, logger="casemate")


def looping(image: str) -> ContainerConfig:
    return ContainerConfig(name="main", image=image, command=("cat",))


def start(image: str, settings: Settings) -> Sandbox:
    return Sandbox.create(
        SandboxConfig(name=NAME), containers=(looping(image),), start=True, settings=settings
    )


def expect_failure(call: Callable[[], object], kind: type[BaseException], text: str = "") -> None:
    """``call`` raises just this. In a function of its own: the error holds what was made, and that must be gone next."""
    with pytest.raises(kind) as caught:
        call()
    assert (type(caught.value), str(caught.value)) == (kind, text)


def expect_group(call: Callable[[], object]) -> list[tuple[type[BaseException], str]]:
    """Classes and texts of the errors of the group that ``call`` raises."""
    with pytest.raises(BaseExceptionGroup) as caught:
        call()
    return [(type(error), str(error)) for error in caught.value.exceptions]


@contextmanager
def leaving_nothing(settings: Settings) -> Iterator[None]:
    """What is there afterwards was there before."""

    def take() -> leaks.Snapshot:
        return leaks.take_snapshot(whole_host=True, state_root=settings.state_root)

    before = take()
    yield
    assert leaks.find_leaks(before, take) == []


def use_name_again(image: str, settings: Settings) -> None:
    with start(image, settings) as sandbox:
        assert sandbox.container().exec(["echo", "again"], capture=True).stdout == "again\n"


def test_create_when_any_step_fails_then_its_error_is_raised_and_nothing_stays(
    busybox: str, settings: Settings
) -> None:
    # One name for all: each start shows that the one before has freed it.
    for name, skipped in START_HITS:
        with leaving_nothing(settings), failpoints.armed(f"{name}={skipped}1*error(made to fail)") as hits:
            expect_failure(lambda: start(busybox, settings), failpoints.POINTS[name], "made to fail")
            assert hits(name) >= 1
    use_name_again(busybox, settings)


def test_create_when_any_native_step_fails_then_its_error_is_raised_and_nothing_stays(
    busybox: str, settings: Settings
) -> None:
    for name in NATIVE:
        with leaving_nothing(settings), failpoints.armed(f"{name}=1*error(made to fail)") as hits:
            expect_failure(lambda: start(busybox, settings), failpoints.POINTS[name], "made to fail")
            assert hits(name) >= 1
    for name in NATIVE[:2]:
        with leaving_nothing(settings), failpoints.armed(f"{name}=1*cancel"):
            expect_failure(lambda: start(busybox, settings), KeyboardInterrupt)
    use_name_again(busybox, settings)


async def is_cancelled_create(image: str, settings: Settings) -> bool:
    task = asyncio.create_task(
        AsyncSandbox.create(
            SandboxConfig(name=NAME), containers=(looping(image),), start=True, settings=settings
        )
    )
    await asyncio.wait([task])
    return task.cancelled()


async def test_create_when_cancelled_at_any_step_then_nothing_stays(busybox: str, settings: Settings) -> None:
    # A task's threads are made on first use and stay with the loop.
    await asyncio.gather(*(asyncio.to_thread(os.getpid) for _ in range(64)))
    for name, skipped in START_HITS:
        with leaving_nothing(settings), failpoints.armed(f"{name}={skipped}1*cancel") as hits:
            assert await is_cancelled_create(busybox, settings)
            assert hits(name) >= 1
    async with await AsyncSandbox.create(SandboxConfig(name=NAME), settings=settings) as sandbox:
        assert sandbox.id == NAME


def killer(settings: Settings) -> Callable[[], None]:
    def kill() -> None:
        (record,) = [record for record, _ in list_records(settings)]
        assert record.vmm is not None
        os.kill(record.vmm.pid, signal.SIGKILL)

    return kill


def expect_vmm_death(image: str, settings: Settings) -> None:
    # The last point lies behind the last wait of a start: the next wait tells.
    with pytest.raises(VmmExitedError) as caught, start(image, settings) as sandbox:
        sandbox.container().wait(60)
    assert caught.value.status == -signal.SIGKILL


def test_create_when_vmm_dies_at_any_step_then_its_end_is_raised_and_nothing_stays(
    busybox: str, settings: Settings
) -> None:
    for name in WITH_VMM:
        with leaving_nothing(settings), failpoints.calling(name, killer(settings)):
            expect_vmm_death(busybox, settings)
    use_name_again(busybox, settings)


@pytest.mark.parametrize(("action", "text"), [("error(second)", "second"), ("cancel", "")])
def test_create_when_it_fails_and_an_undo_step_too_then_the_other_steps_are_done(
    busybox: str, settings: Settings, action: str, text: str
) -> None:
    for name in ("qemu.close", "store.remove", "qemu.quit=error;qemu.killed"):
        with leaving_nothing(settings):
            with failpoints.armed(f"qemu.spawned=error(first);{name}={action}"):
                first, second = expect_group(lambda: start(busybox, settings))
            assert first == (HostError, "first")
            assert second[1] == text
            # The name is free in any case; the directory is a dead one when it could not be removed.
            assert Sandbox.cleanup(NAME, settings=settings).removed == (name == "store.remove")
    use_name_again(busybox, settings)


def test_create_when_it_fails_and_qemu_does_not_quit_then_it_is_killed(
    busybox: str, settings: Settings
) -> None:
    with (
        leaving_nothing(settings),
        failpoints.armed("qemu.spawned=error(first);qemu.quit=error;qemu.killed=off") as hits,
    ):
        expect_failure(lambda: start(busybox, settings), HostError, "first")
        assert hits("qemu.killed") == 1


def test_stop_when_every_step_fails_then_all_are_told_and_only_a_dead_directory_stays(
    busybox: str, settings: Settings
) -> None:
    with leaving_nothing(settings):
        sandbox = start(busybox, settings)
        with failpoints.armed(";".join(f"{name}=error({name})" for name in UNDO)) as hits:
            told = [text for _, text in expect_group(sandbox.stop)]
            assert [hits(name) for name in UNDO] == [1] * len(UNDO)
        assert told == ["agent.close", "qemu.killed", "store.remove"]
        sandbox.stop()
        del sandbox
        assert Sandbox.cleanup(NAME, settings=settings).removed
    use_name_again(busybox, settings)


def test_stop_when_interrupted_while_the_guest_ends_then_the_machine_ends_all_the_same(
    busybox: str, settings: Settings
) -> None:
    with leaving_nothing(settings):
        sandbox = start(busybox, settings)
        with failpoints.armed("agent.destroy_sandbox=cancel"):
            expect_failure(sandbox.stop, KeyboardInterrupt)
        del sandbox


async def test_stop_when_cancelled_while_the_guest_ends_then_the_machine_ends_all_the_same(
    settings: Settings,
) -> None:
    async def use() -> None:
        async with await AsyncSandbox.create(SandboxConfig(name=NAME), settings=settings):
            pass

    task = asyncio.create_task(use())

    def cancel() -> None:
        task.cancel()

    with (
        failpoints.calling("agent.destroy_sandbox", cancel),
        pytest.raises(asyncio.CancelledError),
    ):
        await task
    assert not list((settings.state_root / "sandboxes").iterdir())


def test_create_container_when_any_step_fails_then_name_and_port_are_free_again(
    busybox: str, settings: Settings
) -> None:
    # One port: each step that follows shows that it was given back.
    config = SandboxConfig(name=NAME, hotplug_ports=1)
    steps = (*PLUG, "agent.create_container.before", "agent.create_container.after", "store.write")
    with Sandbox.create(config, settings=settings) as sandbox:
        for name in steps:
            with (
                failpoints.armed(f"{name}=1*error(made to fail)"),
                pytest.raises(failpoints.POINTS[name], match="^made to fail$"),
            ):
                sandbox.create_container(looping(busybox))
            assert sandbox.containers == ()
            with failpoints.armed(f"{name}=1*cancel"), pytest.raises(KeyboardInterrupt):
                sandbox.create_container(looping(busybox))
            assert sandbox.containers == ()
        container = sandbox.create_container(looping(busybox))
        container.start()
        for name in UNPLUG:
            with (
                failpoints.armed(f"{name}=1*error(made to fail)"),
                pytest.raises(failpoints.POINTS[name], match="^made to fail$"),
            ):
                container.remove()
            assert sandbox.containers == (container,)
        container.remove()
        assert sandbox.containers == ()

        with (
            failpoints.calling("qemu.device_add", killer(settings)),
            pytest.raises(VmmExitedError),
        ):
            sandbox.create_container(looping(busybox))


OWNER = """
import sys
from casemate import ContainerConfig, Sandbox, SandboxConfig
container = ContainerConfig(name="main", image=sys.argv[1], command=("cat",))
with Sandbox.create(SandboxConfig(name="swept"), containers=(container,), start=True):
    pass
"""


@pytest.mark.parametrize(
    "setting", ["qemu.spawn=kill", "store.rename=1*off->kill", "agent.create_container.before=kill"]
)
def test_owner_when_killed_at_a_step_then_only_a_dead_directory_stays(
    busybox: str, settings: Settings, setting: str
) -> None:
    environment = os.environ | {"CASEMATE_FAILPOINTS": setting}
    owner = subprocess.run([sys.executable, "-c", OWNER, busybox], env=environment)
    assert owner.returncode == -signal.SIGKILL
    assert Sandbox.cleanup(NAME, settings=settings).removed


def test_create_when_the_environment_names_an_unknown_point_then_told_and_nothing_is_made(
    settings: Settings,
) -> None:
    environment = os.environ | {"CASEMATE_FAILPOINTS": "qemu.start=error"}
    owner = subprocess.run(
        [sys.executable, "-c", OWNER, "oci:/nowhere"], env=environment, capture_output=True, text=True
    )
    assert owner.returncode == 1
    assert "there is no failpoint 'qemu.start'; there are: agent.close, " in owner.stderr
    assert not (settings.state_root / "sandboxes").exists()
