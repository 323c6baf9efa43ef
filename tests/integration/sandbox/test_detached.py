"""Detached sandboxes on a fake VMM: the keeper is real, what it keeps is not. What needs QEMU's control socket is in tests/e2e."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from casemate import (
    AsyncSandbox,
    InvalidStateError,
    NotFoundError,
    Sandbox,
    State,
    UnsupportedError,
    VmmExitedError,
)
from casemate.observe import failpoints
from casemate.persist.outcome import read_end, read_exits
from casemate.persist.store import is_owned, load_record, sandboxes_root
from tests.support.fake_vm import FakeVm

NAME = "kept"


@pytest.fixture(autouse=True)
def _ended(fake_vm: FakeVm) -> Iterator[None]:
    """A test that fails leaves nothing that runs."""
    yield
    if is_owned(fake_vm.settings, NAME):
        with attach(fake_vm) as sandbox:
            sandbox.stop()
    Sandbox.cleanup(NAME, settings=fake_vm.settings)


def create(fake_vm: FakeVm, *names: str, start: bool = True) -> None:
    """Make one with containers that echo their input, and let go of it."""
    Sandbox.create(
        fake_vm.config(NAME, hypervisor="mock"),
        containers=[fake_vm.container(name) for name in names],
        start=start,
        detached=True,
        settings=fake_vm.settings,
    ).close()


def attach(fake_vm: FakeVm) -> Sandbox:
    return Sandbox.attach(NAME, settings=fake_vm.settings)


def is_gone(fake_vm: FakeVm) -> bool:
    return not list(sandboxes_root(fake_vm.settings).iterdir())


def test_attach_when_made_detached_then_all_is_possible_and_stop_removes_everything(fake_vm: FakeVm) -> None:
    create(fake_vm, "main")
    with attach(fake_vm) as sandbox:
        main = sandbox.container()
        assert main.exec(["echo", "there"], capture=True).stdout == "there\n"
        main.process.stdin.write(b"word\n")
        assert next(iter(sandbox.logs(follow=True))).data == b"word\n"
        with pytest.raises(UnsupportedError, match="detached"):
            sandbox.create_container(fake_vm.container("late"))
        with pytest.raises(InvalidStateError, match="casemate logs"):
            main.process.stdout.read()
        sandbox.stop()
    assert is_gone(fake_vm)
    with pytest.raises(NotFoundError):
        attach(fake_vm)


def test_attach_when_done_twice_then_the_guest_is_not_set_up_again(fake_vm: FakeVm) -> None:
    create(fake_vm, "main")
    with attach(fake_vm), attach(fake_vm) as sandbox:
        assert fake_vm.asked().count("CreateSandbox") == 1
        assert fake_vm.asked().count("CreateContainer") == 1
        sandbox.stop()


def test_close_when_called_twice_then_the_vmm_runs_and_nothing_is_lost(fake_vm: FakeVm) -> None:
    create(fake_vm, "main")
    sandbox = attach(fake_vm)
    pid = sandbox.vmm_pid
    sandbox.close()
    sandbox.close()
    assert Path(f"/proc/{pid}").exists()
    with pytest.raises(InvalidStateError):
        sandbox.create_container(fake_vm.container("late"))
    with attach(fake_vm) as again:
        assert again.container().exec(["echo", "on"], capture=True).stdout == "on\n"
        again.stop()
    assert is_gone(fake_vm)


def test_container_when_it_ends_while_nobody_is_attached_then_the_next_one_knows(fake_vm: FakeVm) -> None:
    create(fake_vm, "main", "other")
    with attach(fake_vm) as sandbox:
        sandbox.container("main").kill()
        assert list(sandbox.logs("main", follow=True)) == []
    assert read_exits(sandboxes_root(fake_vm.settings) / NAME)["main"].status == 137
    with attach(fake_vm) as sandbox:
        main = sandbox.container("main")
        assert (main.state, main.process.exit_code, main.wait()) == (State.STOPPED, 137, 137)
        main.remove()
        assert [one.id for one in load_record(fake_vm.settings, NAME).containers] == ["other"]
        assert not list((sandboxes_root(fake_vm.settings) / NAME / "exits").iterdir())
        sandbox.stop()


def test_attach_when_eight_use_it_at_once_then_the_document_has_every_change(fake_vm: FakeVm) -> None:
    names = [f"c{number}" for number in range(8)]
    create(fake_vm, *names, start=False)

    def use(name: str) -> int:
        with attach(fake_vm) as sandbox:
            container = sandbox.container(name)
            container.start()
            container.kill()
            return container.wait()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, names)) == [137] * 8
    record = load_record(fake_vm.settings, NAME)
    assert [(one.id, one.state, one.exit_code) for one in record.containers] == [
        (name, State.STOPPED, 137) for name in names
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda sandbox: sandbox.stop(), [attach(fake_vm) for _ in range(4)]))
    assert is_gone(fake_vm)


async def test_create_when_detached_on_a_loop_then_the_same(fake_vm: FakeVm) -> None:
    async with await AsyncSandbox.create(
        fake_vm.config(NAME, hypervisor="mock"),
        containers=(fake_vm.container(),),
        start=True,
        detached=True,
        settings=fake_vm.settings,
    ) as sandbox:
        await sandbox.container().process.stdin.write(b"one\n")
        async with sandbox.logs(follow=True) as reader:
            async for entry in reader:
                assert entry.data == b"one\n"
                break
    async with await AsyncSandbox.attach(NAME, settings=fake_vm.settings) as sandbox:
        await sandbox.container().kill()
        assert [entry.data async for entry in sandbox.logs(follow=True)] == [b"one\n"]
        await sandbox.stop()
    assert is_gone(fake_vm)


@pytest.mark.parametrize("action", ["error(made to fail)", "cancel"])
def test_create_when_a_step_fails_then_nothing_stays(fake_vm: FakeVm, action: str) -> None:
    points = [name for name in failpoints.POINTS if name.startswith("keeper.")]
    assert len(points) == 6
    for point in points:
        kind = KeyboardInterrupt if action == "cancel" else failpoints.POINTS[point]
        with failpoints.armed(f"{point}=1*{action}") as hits:
            with pytest.raises(kind):
                create(fake_vm, "main")
            assert hits(point) == 1
        assert is_gone(fake_vm)


def test_create_when_the_vmm_rejects_its_plan_then_its_words_are_told_and_nothing_stays(
    fake_vm: FakeVm,
) -> None:
    with pytest.raises(VmmExitedError, match="-nonsense: invalid option"):
        Sandbox.create(
            fake_vm.config(NAME, qemu_arguments=("-nonsense",)), detached=True, settings=fake_vm.settings
        )
    assert is_gone(fake_vm)


def test_vmm_when_killed_then_waiting_calls_are_told_and_the_next_attach_names_the_cause(
    fake_vm: FakeVm,
) -> None:
    create(fake_vm, "main")
    with attach(fake_vm) as sandbox:
        pid, main = sandbox.vmm_pid, sandbox.container()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(main.wait)
            os.kill(pid, signal.SIGKILL)
            assert "ended by signal 9" in str(waiting.exception(30)) or "SIGKILL" in str(
                waiting.exception(30)
            )
    end = read_end(sandboxes_root(fake_vm.settings) / NAME)
    assert end is not None
    assert (end.status, end.wanted) == (-signal.SIGKILL, False)
    with pytest.raises(InvalidStateError, match="its VMM was ended by signal 9"):
        attach(fake_vm)
    (info,) = Sandbox.list(settings=fake_vm.settings)
    assert (info.alive, info.record is not None and info.record.state) == (False, State.STOPPED)


CREATOR = """
import os, sys
from pathlib import Path
import msgspec
from casemate import Sandbox
from tests.support.fake_vm import make_fake_vm
directory, state_root, log = map(Path, sys.argv[1:])
vm = make_fake_vm(directory, directory / "cache", state_root, log)
settings = msgspec.structs.replace(vm.settings, failpoints=os.environ["FAILPOINTS"])
Sandbox.create(vm.config("kept", hypervisor="mock"), containers=(vm.container(),), start=True, detached=True, settings=settings).close()
"""
"""Run in a process of its own, which a failpoint kills."""


def stop(fake_vm: FakeVm) -> None:
    with attach(fake_vm) as sandbox:
        sandbox.stop()


def clean_up(fake_vm: FakeVm) -> None:
    assert Sandbox.cleanup(NAME, settings=fake_vm.settings).removed


REMOVALS = {True: stop, False: clean_up}


@pytest.mark.parametrize(
    ("setting", "complete"),
    [
        ("keeper.spawn=kill", False),
        ("store.write=1*off->kill", False),
        ("keeper.recorded=kill", False),
        ("keeper.request=kill", False),
        ("sandbox.listen=kill", False),
        ("store.rename=2*off->kill", False),
        ("sandbox.connect=kill", False),
        ("agent.create_sandbox.before=kill", False),
        ("agent.start_container.after=kill", False),
        ("keeper.keep=kill", False),
        ("store.rename=4*off->kill", False),
        ("keeper.commit=kill", False),
        ("keeper.committed=kill", True),
    ],
)
def test_create_when_the_creator_is_killed_then_complete_or_dead_at_once(
    fake_vm: FakeVm, setting: str, complete: bool
) -> None:
    words = [sys.executable, "-c", CREATOR, fake_vm.qemu.parent, fake_vm.settings.state_root, fake_vm.log]
    environment = os.environ | {"FAILPOINTS": setting, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(list(map(str, words)), env=environment, stderr=subprocess.PIPE, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert is_owned(fake_vm.settings, NAME) is complete
    REMOVALS[complete](fake_vm)
    assert is_gone(fake_vm)
    assert str(fake_vm.settings.state_root) not in Path("/proc/net/unix").read_text()
