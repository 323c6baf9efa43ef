"""What a dead owner left, told of and removed from disk alone."""

from __future__ import annotations

import concurrent.futures
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from casemate import AsyncSandbox, Sandbox
from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError, InvalidStateError
from casemate.persist import recovery, store
from casemate.persist.holders import find_socket_holders
from casemate.persist.record import ProcessRecord, SandboxRecord
from tests.unit.persist.test_store import NAME, record

GONE = ProcessRecord(pid=2**22 + 1, start_time_ticks=1)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_root=tmp_path, cache_root=tmp_path / "cache")


@pytest.fixture
def left(settings: Settings) -> Path:
    """Directory of a sandbox whose owner is dead, with its lock."""
    path = store.sandboxes_root(settings) / NAME
    path.mkdir(parents=True)
    (path / "lock").touch()
    return path


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate()


def dead_record(vmm: ProcessRecord | None = None) -> SandboxRecord:
    return msgspec.structs.replace(record(vmm), owner=GONE)


def write(path: Path, what: SandboxRecord) -> None:
    (path / "state.json").write_bytes(msgspec.json.encode(what))


def test_cleanup_when_vmm_is_left_then_it_is_ended_and_the_second_time_does_nothing(
    settings: Settings, left: Path, child: subprocess.Popen[bytes]
) -> None:
    write(left, dead_record(store.process_record(child.pid)))
    (left / "qmp.sock").touch()
    done = Sandbox.cleanup(NAME, settings=settings)
    assert done == recovery.CleanupReport(sandbox_id=NAME, removed=True, ended_pids=(child.pid,))
    assert child.wait(10) == -9
    assert list(store.sandboxes_root(settings).iterdir()) == []
    assert Sandbox.cleanup(NAME, settings=settings) == recovery.CleanupReport(sandbox_id=NAME, removed=False)


async def test_cleanup_when_called_on_a_loop_then_the_same(settings: Settings, left: Path) -> None:
    write(left, dead_record())
    assert [one.id for one in await AsyncSandbox.list(settings=settings)] == [NAME]
    assert (await AsyncSandbox.cleanup(NAME, settings=settings)).removed
    assert await AsyncSandbox.list(settings=settings) == ()


def test_cleanup_when_the_vmms_number_was_given_to_another_then_that_one_lives(
    settings: Settings, left: Path, child: subprocess.Popen[bytes]
) -> None:
    ticks = store.process_record(child.pid).start_time_ticks
    write(left, dead_record(ProcessRecord(pid=child.pid, start_time_ticks=ticks + 1)))
    assert Sandbox.cleanup(NAME, settings=settings).ended_pids == ()
    child.communicate(b"\n", timeout=10)
    assert child.returncode == 0
    assert not left.exists()


@pytest.mark.parametrize("document", [None, b"", b'{"version": 1', b"[]", b'{"version": 99}'])
def test_cleanup_when_the_document_tells_nothing_then_a_vmm_is_found_by_its_socket(
    settings: Settings, left: Path, document: bytes | None
) -> None:
    if document is not None:
        (left / "state.json").write_bytes(document)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left / "qmp.sock"))
        listener.listen()
        holder = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[listener.fileno()]
        )
    try:
        assert find_socket_holders(left) == (holder.pid,)
        done = Sandbox.cleanup(NAME, settings=settings)
        assert done.ended_pids == (holder.pid,)
        assert holder.wait(10) == -9
        assert not left.exists()
        # What was never written told of nothing; what can't be read might have.
        assert len(done.unverified) == (0 if document is None else 1)
        assert all(str(left / "state.json") in sentence for sentence in done.unverified)
    finally:
        holder.kill()
        holder.communicate()


def test_cleanup_when_owner_lives_then_refused_and_all_is_left_as_it_was(
    settings: Settings, child: subprocess.Popen[bytes]
) -> None:
    directory = store.SandboxDirectory.take(settings, NAME)
    directory.write(record(store.process_record(child.pid)))
    with pytest.raises(InvalidStateError, match=str(os.getpid())) as caught:
        Sandbox.cleanup(NAME, settings=settings)
    assert (caught.value.wanted, caught.value.sandbox_id) == ("dead", NAME)
    assert child.poll() is None
    assert store.load_record(settings, NAME).vmm is not None
    directory.remove()


def test_cleanup_when_owner_lives_and_its_lock_was_removed_then_refused_by_pid_and_start_time(
    settings: Settings, left: Path
) -> None:
    (left / "lock").unlink()
    write(left, record())
    with pytest.raises(InvalidStateError):
        Sandbox.cleanup(NAME, settings=settings)
    assert [entry.name for entry in left.iterdir()] == ["state.json"]
    write(left, dead_record())
    assert Sandbox.cleanup(NAME, settings=settings).removed


def test_cleanup_when_somebody_else_is_at_it_then_the_dead_owner_is_not_called_living(
    settings: Settings, left: Path
) -> None:
    write(left, dead_record())
    other = store.SandboxDirectory.take_left(settings, NAME)
    assert other is not None
    with pytest.raises(InvalidStateError, match="being removed at this moment"):
        Sandbox.cleanup(NAME, settings=settings)
    other.remove()
    assert not Sandbox.cleanup(NAME, settings=settings).removed


def test_cleanup_when_nothing_was_made_in_the_directory_yet_then_it_is_removed(settings: Settings) -> None:
    path = store.sandboxes_root(settings) / NAME
    path.mkdir(parents=True)
    assert Sandbox.cleanup(NAME, settings=settings).removed
    assert not path.exists()


def test_cleanup_when_the_directory_is_a_link_then_its_target_is_left_alone(
    settings: Settings, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").touch()
    store.sandboxes_root(settings).mkdir()
    (store.sandboxes_root(settings) / NAME).symlink_to(target)
    with pytest.raises(InvalidConfigError, match="symbolic link"):
        Sandbox.cleanup(NAME, settings=settings)
    assert (target / "kept").exists()
    assert Sandbox.list(settings=settings) == ()


@pytest.mark.parametrize("name", ["", "..", "../one", "a/b"])
def test_cleanup_when_that_is_no_name_then_refused(settings: Settings, name: str) -> None:
    with pytest.raises(InvalidConfigError):
        Sandbox.cleanup(name, settings=settings)


def test_cleanup_when_several_do_it_at_once_then_it_is_gone_and_none_fails(
    settings: Settings, left: Path
) -> None:
    write(left, dead_record())

    def one(_: int) -> bool:
        try:
            return Sandbox.cleanup(NAME, settings=settings).removed
        except InvalidStateError:
            return False  # another one holds the lock

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert any(list(pool.map(one, range(32))))
    assert not left.exists()


def test_list_when_living_dead_damaged_and_foreign_ones_lie_there_then_each_is_told_of(
    settings: Settings,
) -> None:
    living = store.SandboxDirectory.take(settings, NAME)
    living.write(record())
    root = store.sandboxes_root(settings)
    for name, document in (
        ("damaged", b"{"),
        ("dead", msgspec.json.encode(dead_record())),
        ("unwritten", None),
    ):
        (root / name).mkdir()
        (root / name / "lock").touch()
        if document is not None:
            (root / name / "state.json").write_bytes(document)
    (root / "file").touch()
    (root / "-no-name-").mkdir()
    found = {one.id: one for one in Sandbox.list(settings=settings)}
    assert list(found) == ["damaged", "dead", NAME, "unwritten"]
    assert {name: one.alive for name, one in found.items()} == {
        "damaged": False,
        "dead": False,
        NAME: True,
        "unwritten": False,
    }
    assert found[NAME].record == record()
    assert found[NAME].owner_pid == os.getpid()
    assert found["dead"].problem is None
    assert "state.json" in (found["damaged"].problem or "")
    assert found["damaged"].owner_pid is None
    assert "no state document" in (found["unwritten"].problem or "")
    living.remove()


def test_list_when_there_is_no_state_root_then_empty(tmp_path: Path) -> None:
    assert Sandbox.list(settings=Settings(state_root=tmp_path / "absent")) == ()
