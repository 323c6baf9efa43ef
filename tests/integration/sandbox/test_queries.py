"""What a sandbox tells of itself, what it refuses in which state, and when its document is written. On a fake VMM."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casemate import Container, InvalidStateError, NotFoundError, Sandbox, State, _core
from casemate.agent.transport import AGENT_PORT, HybridTransport, parse_url
from casemate.observe import failpoints
from casemate.persist.store import load_record, sandboxes_root
from tests.support.fake_vm import FakeVm

NAME = "asked"


@contextmanager
def made(fake_vm: FakeVm, **values: str) -> Iterator[Sandbox]:
    """One with two containers that were not started. No fixture: that would hold it until after the leak check."""
    containers = [fake_vm.container("one"), fake_vm.container("two")]
    config = fake_vm.config(NAME, **values)
    with Sandbox.create(config, containers=containers, settings=fake_vm.settings) as sandbox:
        yield sandbox


def test_sandbox_when_asked_then_id_process_and_kind_are_those_of_its_vmm(fake_vm: FakeVm) -> None:
    with made(fake_vm) as sandbox:
        record = sandbox.inspect()
        assert (sandbox.id, record.id, record.hypervisor, record.machine) == (NAME, NAME, "qemu", "q35")
        assert record.vmm is not None
        assert sandbox.vmm_pid == record.vmm.pid
        assert NAME.encode() in Path(f"/proc/{sandbox.vmm_pid}/cmdline").read_bytes()
        assert record == load_record(fake_vm.settings, NAME)


def test_agent_url_when_parsed_then_its_agent_answers_there(fake_vm: FakeVm) -> None:
    with made(fake_vm, hypervisor="mock") as sandbox:
        transport = parse_url(sandbox.agent_url)
        assert isinstance(transport, HybridTransport)
        os.close(_core.connect_hybrid(str(transport.path), AGENT_PORT, timeout_s=10))


def test_inspect_when_containers_are_there_then_each_has_its_record_and_it_is_a_copy(fake_vm: FakeVm) -> None:
    with made(fake_vm) as sandbox:
        before = sandbox.inspect()
        assert [(one.id, one.state, one.exit_code) for one in before.containers] == [
            ("one", State.READY, None),
            ("two", State.READY, None),
        ]
        assert before.containers[0].process.args == ("cat",)
        sandbox.container("one").start()
        assert before.containers[0].state is State.READY
        assert sandbox.inspect().containers[0].state is State.RUNNING


@pytest.mark.parametrize("name", [None, "", "three"])
def test_container_when_it_is_not_told_apart_then_the_names_are_told(
    fake_vm: FakeVm, name: str | None
) -> None:
    with made(fake_vm) as sandbox, pytest.raises(NotFoundError, match="one, two"):
        sandbox.container(name)


CALLS: dict[str, Callable[[Container], object]] = {
    "exec": lambda container: container.exec(["true"]),
    "pause": lambda container: container.pause(),
    "resume": lambda container: container.resume(),
}


@pytest.mark.parametrize("verb", CALLS)
def test_container_when_it_does_not_run_then_the_verb_is_named(fake_vm: FakeVm, verb: str) -> None:
    with made(fake_vm) as sandbox:
        with pytest.raises(InvalidStateError, match=verb) as caught:
            CALLS[verb](sandbox.container("one"))
        assert (caught.value.state, caught.value.op) == ("ready", f"container.{verb}")


def test_container_when_it_runs_then_another_start_is_refused(fake_vm: FakeVm) -> None:
    with made(fake_vm) as sandbox:
        one = sandbox.container("one")
        one.start()
        with pytest.raises(InvalidStateError, match=r"container\.start"):
            one.start()
        one.pause()
        with pytest.raises(InvalidStateError, match="exec"):
            one.exec(["true"])
        one.resume()


SANDBOX_CALLS: dict[str, Callable[[Sandbox, FakeVm], object]] = {
    "create_container": lambda sandbox, fake_vm: sandbox.create_container(fake_vm.container("late")),
    "attach_block": lambda sandbox, fake_vm: sandbox.attach_block(fake_vm.kernel),
    "attach_nic": lambda sandbox, _: sandbox.attach_nic(),
    "detach": lambda sandbox, _: sandbox.detach("x"),
    "pause": lambda sandbox, _: sandbox.pause(),
    "resume": lambda sandbox, _: sandbox.resume(),
}


@pytest.mark.parametrize("verb", SANDBOX_CALLS)
def test_sandbox_when_it_was_stopped_then_the_verb_is_named_and_another_stop_is_nothing(
    fake_vm: FakeVm, verb: str
) -> None:
    sandbox = Sandbox.create(fake_vm.config(NAME), settings=fake_vm.settings)
    sandbox.stop()
    with pytest.raises(InvalidStateError, match=verb):
        SANDBOX_CALLS[verb](sandbox, fake_vm)
    sandbox.stop()
    assert sandbox.state is State.STOPPED


def test_stop_when_paused_or_running_then_it_is_gone(fake_vm: FakeVm) -> None:
    for prepare in (lambda sandbox: sandbox.pause(), lambda sandbox: None):
        with Sandbox.create(fake_vm.config(NAME), settings=fake_vm.settings) as sandbox:
            prepare(sandbox)
            sandbox.stop()
        assert not list(sandboxes_root(fake_vm.settings).iterdir())


def test_document_when_anything_changes_then_it_is_written_each_time(fake_vm: FakeVm) -> None:
    with failpoints.armed("store.rename=off") as hits:
        written: dict[str, int] = {}

        def count(name: str, call: Callable[[], object]) -> None:
            before = hits("store.rename")
            call()
            written[name] = hits("store.rename") - before

        sandbox = Sandbox.create(
            fake_vm.config(NAME), containers=[fake_vm.container("one")], settings=fake_vm.settings
        )
        one = sandbox.container("one")
        calls: dict[str, Callable[[], object]] = {
            "start": one.start,
            "pause container": one.pause,
            "resume container": one.resume,
            "exec": lambda: one.exec(["true"], capture=True),
            "pause": sandbox.pause,
            "resume": sandbox.resume,
            "kill": one.kill,
            "wait": one.wait,
            "wait again": one.wait,
            "remove": one.remove,
        }
        for name, call in calls.items():
            count(name, call)
        sandbox.stop()
    # What changes nothing in it writes nothing: exec, a signal, a second wait.
    assert written == {
        "start": 1,
        "pause container": 1,
        "resume container": 1,
        "exec": 0,
        "pause": 1,
        "resume": 1,
        "kill": 0,
        "wait": 1,
        "wait again": 0,
        "remove": 1,
    }


@pytest.mark.parametrize("detached", [False, True])
def test_directory_when_it_runs_then_files_and_directories_are_the_users_alone(
    fake_vm: FakeVm, detached: bool
) -> None:
    with Sandbox.create(
        fake_vm.config(NAME),
        containers=[fake_vm.container("one")],
        start=True,
        detached=detached,
        settings=fake_vm.settings,
    ) as sandbox:
        directory = sandboxes_root(fake_vm.settings) / NAME
        found = {path: path.lstat() for path in (directory, *directory.rglob("*"))}
        assert {path.name for path in found} >= {NAME, "state.json", "lock", "vsock.sock", "qmp.sock"}
        for path, facts in found.items():
            assert (stat.S_IMODE(facts.st_mode) & 0o077, facts.st_uid) == (0, os.geteuid()), path
        sandbox.stop()
