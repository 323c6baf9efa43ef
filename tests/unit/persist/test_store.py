"""State directories: the lock, the document, what a dead owner leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from casemate.agent.messages import ProcessSpec
from casemate.config.settings import Settings
from casemate.errors import AlreadyExistsError, HostError, InvalidConfigError, NotFoundError
from casemate.persist import store
from casemate.persist.record import ContainerRecord, ProcessRecord, SandboxRecord
from casemate.types import SandboxId, State

NAME = SandboxId("one")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_root=tmp_path, cache_root=tmp_path / "cache")


def record(vmm: ProcessRecord | None = None) -> SandboxRecord:
    return SandboxRecord(
        id=NAME,
        state=State.RUNNING,
        created_unix_ns=1,
        owner=store.process_record(os.getpid()),
        hypervisor="qemu",
        machine="q35",
        accel="tcg",
        accel_reason="asked for",
        vcpus=1,
        memory_mib=256,
        kernel="/k",
        kernel_release="6.1",
        initrd=None,
        vmm=vmm,
        containers=(
            ContainerRecord(
                id="c",
                image="oci:x",
                image_digest="sha256:0",
                process=ProcessSpec(args=("sh",), env=("A=b",)),
                state=State.READY,
                created_unix_ns=2,
            ),
        ),
    )


def test_write_when_read_back_then_the_same(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    assert store.load_record(settings, NAME) == record()
    assert sorted(path.name for path in directory.path.iterdir()) == ["lock", "state.json"]
    directory.remove()


def test_take_when_owner_lives_then_refused_and_its_state_kept(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    with pytest.raises(AlreadyExistsError):
        store.SandboxDirectory.take(settings, NAME)
    assert store.is_owned(settings, NAME)
    assert store.load_record(settings, NAME).id == NAME
    directory.remove()


def test_take_when_owner_is_dead_then_its_remains_are_cleared(settings: Settings) -> None:
    path = store.sandboxes_root(settings) / NAME
    path.mkdir(parents=True)
    (path / "lock").touch()
    (path / "vsock.sock").touch()
    (path / "sub").mkdir()
    directory = store.SandboxDirectory.take(settings, NAME)
    assert [entry.name for entry in path.iterdir()] == ["lock"]
    directory.remove()
    assert not path.exists()


def test_remove_when_called_twice_then_the_second_does_nothing(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.remove()
    again = store.SandboxDirectory.take(settings, NAME)
    directory.remove()
    assert again.path.exists()
    again.remove()


def test_take_when_path_is_too_long_for_a_socket_then_refused_before_anything_is_made(tmp_path: Path) -> None:
    root = tmp_path / ("x" * 100)
    with pytest.raises(InvalidConfigError):
        store.SandboxDirectory.take(Settings(state_root=root), NAME)
    assert not root.exists()


def test_load_record_when_absent_then_known_names_are_told(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    with pytest.raises(NotFoundError, match="there are: one"):
        store.load_record(settings, "other")
    directory.remove()


@pytest.mark.parametrize(
    "document",
    [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 1, "id": 3}', b'{"version": 1, "id": "\xff"}'],
)
def test_load_record_when_damaged_then_the_file_is_named(settings: Settings, document: bytes) -> None:
    path = store.sandboxes_root(settings) / NAME
    path.mkdir(parents=True)
    (path / "state.json").write_bytes(document)
    with pytest.raises(InvalidConfigError, match="state.json"):
        store.load_record(settings, NAME)


def test_load_record_when_newer_then_refused(settings: Settings) -> None:
    path = store.sandboxes_root(settings) / NAME
    path.mkdir(parents=True)
    document = msgspec.to_builtins(record()) | {"version": 99}
    (path / "state.json").write_bytes(msgspec.json.encode(document))
    with pytest.raises(InvalidConfigError, match="version 99"):
        store.load_record(settings, NAME)


def test_load_record_when_name_leaves_the_directory_then_refused(settings: Settings) -> None:
    with pytest.raises(InvalidConfigError):
        store.load_record(settings, "../one")


def test_list_records_when_owner_died_then_not_alive(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    assert [(one.id, alive) for one, alive in store.list_records(settings)] == [(NAME, True)]
    os.close(directory._lock_fd)
    directory._lock_fd = -1
    assert [(one.id, alive) for one, alive in store.list_records(settings)] == [(NAME, False)]


def test_kill_recorded_when_number_was_given_to_another_process_then_left_alone(settings: Settings) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        ticks = store.process_record(child.pid).start_time_ticks
        store.kill_recorded(ProcessRecord(pid=child.pid, start_time_ticks=ticks + 1))
        child.communicate(b"\n", timeout=10)
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()


def test_take_when_a_dead_owners_vmm_is_left_then_it_is_ended_first(settings: Settings) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        path = store.sandboxes_root(settings) / NAME
        path.mkdir(parents=True)
        (path / "lock").touch()
        (path / "state.json").write_bytes(msgspec.json.encode(record(store.process_record(child.pid))))
        directory = store.SandboxDirectory.take(settings, NAME)
        assert child.wait(10) == -9
        assert [entry.name for entry in path.iterdir()] == ["lock"]
        directory.remove()
    finally:
        child.kill()
        child.communicate()


def test_take_when_the_lock_is_gone_and_the_owner_lives_then_refused(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    (directory.path / "lock").unlink()
    with pytest.raises(AlreadyExistsError):
        store.SandboxDirectory.take(settings, NAME)
    assert store.is_owned(settings, NAME)
    assert store.load_record(settings, NAME) == record()
    directory.remove()
    assert not directory.path.exists() or list(directory.path.iterdir()) == []
    directory.release()


def test_remove_when_somebody_removed_the_directory_then_the_lock_is_let_go(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    (directory.path / "lock").unlink()
    directory.path.rmdir()
    directory.remove()
    store.SandboxDirectory.take(settings, NAME).remove()


def test_is_alive_when_living_dead_reused_or_another_users_then_by_pid_and_start_time() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living = store.process_record(child.pid)
    assert store.is_alive(living)
    assert not store.is_alive(ProcessRecord(pid=living.pid, start_time_ticks=living.start_time_ticks + 1))
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not store.is_alive(living), "a process that nobody waited for yet is dead"
    child.wait()
    assert not store.is_alive(living)
    # Process 1 is root's, whoever runs this.
    assert store.is_alive(store.process_record(1))
    assert not store.is_alive(ProcessRecord(pid=2**22 + 1, start_time_ticks=1))


def test_write_when_one_before_was_cut_short_then_the_old_document_loads_and_the_next_replaces_it(
    settings: Settings,
) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    (directory.path / "state.json.new").write_bytes(b'{"version": 1, "id"')
    assert store.load_record(settings, NAME) == record()
    paused = msgspec.structs.replace(record(), state=State.PAUSED)
    directory.write(paused)
    assert store.load_record(settings, NAME) == paused
    directory.remove()


def test_write_when_it_fails_then_the_old_document_and_the_directory_stay(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    (directory.path / "state.json.new").mkdir()
    with pytest.raises(HostError, match="Is a directory"):
        directory.write(msgspec.structs.replace(record(), state=State.PAUSED))
    assert store.load_record(settings, NAME) == record()
    directory.remove()
    assert not directory.path.exists()


def test_remove_when_files_cant_be_removed_then_raised_and_what_is_left_is_a_dead_ones(
    settings: Settings,
) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record())
    (directory.path / "lock").unlink()
    (directory.path / "lock").mkdir()
    with pytest.raises(IsADirectoryError):
        directory.remove()
    (directory.path / "lock").rmdir()
    store.SandboxDirectory.take(settings, NAME).remove()
    assert not directory.path.exists()


def test_take_when_the_lock_cant_be_opened_then_host_error_with_its_path(settings: Settings) -> None:
    path = store.sandboxes_root(settings) / NAME
    (path / "lock").mkdir(parents=True)
    with pytest.raises(HostError) as caught:
        store.SandboxDirectory.take(settings, NAME)
    assert caught.value.target == str(path)


GOLDEN = """{
 "version": 3,
 "id": "one",
 "state": "running",
 "created_unix_ns": 1,
 "owner": {
  "pid": 7,
  "start_time_ticks": 8
 },
 "hypervisor": "qemu",
 "machine": "q35",
 "accel": "tcg",
 "accel_reason": "asked for",
 "vcpus": 1,
 "memory_mib": 256,
 "kernel": "/k",
 "kernel_release": "6.1",
 "initrd": null,
 "keeper": {
  "pid": 7,
  "start_time_ticks": 8
 },
 "vmm": {
  "pid": 9,
  "start_time_ticks": 10
 },
 "agent_url": "",
 "containers": [
  {
   "id": "c",
   "image": "oci:x",
   "image_digest": "sha256:0",
"""


def test_write_when_the_document_is_read_by_others_then_it_has_this_form(settings: Settings) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    keeper = ProcessRecord(pid=7, start_time_ticks=8)
    directory.write(
        msgspec.structs.replace(
            record(ProcessRecord(pid=9, start_time_ticks=10)), owner=keeper, keeper=keeper
        )
    )
    text = (directory.path / "state.json").read_text()
    directory.remove()
    assert text.startswith(GOLDEN)
    assert set(msgspec.json.decode(text)) == set(SandboxRecord.__struct_fields__)
