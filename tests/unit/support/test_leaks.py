"""The leak check finds each kind of thing that a test may leave."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import leaks


@contextmanager
def open_file() -> Iterator[str]:
    with Path("/dev/null").open("rb") as file:
        yield f"descriptor: {file.fileno()} -> /dev/null"


@contextmanager
def running_thread() -> Iterator[str]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-behind")
    thread.start()
    yield "thread: left-behind (Python)"
    end.set()
    thread.join()


@contextmanager
def living_child() -> Iterator[str]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        yield f"child: {child.pid} cat"
        child.communicate()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SETTLE_S", 0.0)


@pytest.mark.parametrize("leave", [open_file, running_thread, living_child])
def test_find_leaks_when_something_is_left_then_it_is_named(leave: object) -> None:
    before = leaks.take_snapshot(whole_host=False)
    with leave() as name:  # type: ignore[operator]
        assert name in leaks.find_leaks(before, lambda: leaks.take_snapshot(whole_host=False))


def test_find_leaks_when_state_files_are_left_then_they_are_named(tmp_path: Path) -> None:
    def take() -> leaks.Snapshot:
        return leaks.take_snapshot(whole_host=True, state_root=tmp_path)

    before = take()
    (tmp_path / "sandboxes").mkdir()
    assert leaks.find_leaks(before, take) == []
    (tmp_path / "sandboxes" / "one").mkdir()
    assert leaks.find_leaks(before, take) == [f"state file: {tmp_path}/sandboxes/one"]


def test_find_leaks_when_process_names_the_state_root_then_it_is_named(tmp_path: Path) -> None:
    def take() -> leaks.Snapshot:
        return leaks.take_snapshot(whole_host=True, state_root=tmp_path)

    before = take()
    with subprocess.Popen(["sh", "-c", "read x", str(tmp_path)], stdin=subprocess.PIPE) as child:
        found = leaks.find_leaks(before, take)
        child.communicate()
    assert f"process of a sandbox: {child.pid} sh -c read x {tmp_path} " in found


def test_find_leaks_when_nothing_is_left_then_list_is_empty() -> None:
    before = leaks.take_snapshot(whole_host=False)
    assert leaks.find_leaks(before, lambda: leaks.take_snapshot(whole_host=False)) == []
