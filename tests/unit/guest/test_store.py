from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from casemate.errors import DeadlineExceededError, HostError
from casemate.guest.store import InitrdRecord, KernelEntry, Store

RECORD = InitrdRecord(key="k1", initrd_bytes=4, modules=("virtio",), kernel_id="a", machine="q35")


class _Facts(msgspec.Struct, frozen=True):
    size_bytes: int


def _entry(kernel_id: str, kernel_bytes: int = 6) -> KernelEntry:
    return KernelEntry(
        id=kernel_id, release="6.1", source="test", kernel="vmlinux", kernel_bytes=kernel_bytes
    )


def _add(store: Store, kernel_id: str, content: bytes = b"kernel") -> KernelEntry:
    with store.staging("kernel") as staging:
        made = staging / "made"
        made.mkdir()
        (made / "vmlinux").write_bytes(content)
        return store.publish_kernel(made, _entry(kernel_id, len(content)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "guest")


def test_store_when_only_read_makes_nothing(store: Store) -> None:
    assert store.read_current("auto") is None
    assert store.list_kernels() == ()
    assert store.list_initrds() == ()
    assert not store.root.exists()


def test_publish_kernel_then_current_stands_for_it(store: Store) -> None:
    entry = _add(store, "a")
    store.write_current("6.1", "a")

    assert store.read_current("6.1") == entry
    assert store.kernel_path(entry).read_bytes() == b"kernel"
    assert store.names_of("a") == ("6.1",)
    assert list((store.root / "tmp").iterdir()) == []


def test_write_current_again_replaces_it(store: Store) -> None:
    _add(store, "a")
    _add(store, "b")
    store.write_current("auto", "a")
    store.write_current("auto", "b")

    current = store.read_current("auto")
    assert current is not None
    assert current.id == "b"


def test_publish_kernel_of_damaged_entry_replaces_it(store: Store) -> None:
    entry = _add(store, "a")
    store.kernel_path(entry).write_bytes(b"cut")

    assert store.read_kernel("a") is None
    _add(store, "a")
    assert store.read_kernel("a") == entry


def test_staging_when_maker_fails_leaves_nothing(store: Store) -> None:
    def make() -> None:
        with store.staging("kernel") as staging:
            (staging / "half").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        make()

    assert list((store.root / "tmp").iterdir()) == []
    assert store.list_kernels() == ()


def test_staging_sweeps_what_a_dead_maker_left_and_spares_a_living_one(store: Store) -> None:
    with store.staging("living") as living:
        dead = store.root / "tmp" / "dead.1"
        dead.mkdir()
        (dead / "half").write_bytes(b"x")
        for path in (dead, living):
            os.utime(path, (1, 1))

        with store.staging("new"):
            assert living.is_dir()
            assert not dead.exists()


def test_publish_initrd_then_read_needs_both_files_whole(store: Store) -> None:
    store.publish_initrd(RECORD, b"cpio")

    assert store.read_initrd("k1") == RECORD
    assert store.list_initrds() == (RECORD,)
    store.initrd_path("k1").write_bytes(b"cp")
    assert store.read_initrd("k1") is None


def test_facts_are_found_once_until_the_file_changes(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    asked = []

    def find() -> _Facts:
        asked.append(1)
        return _Facts(path.stat().st_size)

    assert store.facts(path, _Facts, find) == store.facts(path, _Facts, find) == _Facts(1)
    path.write_bytes(b"12")
    assert store.facts(path, _Facts, find) == _Facts(2)
    assert len(asked) == 2


def test_facts_of_a_new_file_of_the_same_length_are_found_again(store: Store, tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"1")
    other.write_bytes(b"2")
    status = path.stat()
    found = iter((_Facts(1), _Facts(2)))
    store.facts(path, _Facts, lambda: next(found))

    other.rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert store.facts(path, _Facts, lambda: next(found)) == _Facts(2)


def test_facts_are_bounded_in_number(store: Store, tmp_path: Path) -> None:
    for index in range(300):
        path = tmp_path / f"file{index}"
        path.write_bytes(b"1")
        store._write_facts(f"key{index}", b"{}")

    assert len(list((store.root / "facts").iterdir())) <= 256


def test_facts_where_the_cache_is_a_file_are_found_each_time(tmp_path: Path) -> None:
    (tmp_path / "guest").write_bytes(b"")
    path = tmp_path / "file"
    path.write_bytes(b"1")

    assert Store(tmp_path / "guest").facts(path, _Facts, lambda: _Facts(1)) == _Facts(1)


def test_write_where_the_cache_is_a_file_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "guest").write_bytes(b"")

    with pytest.raises(HostError, match="CASEMATE_CACHE"):
        Store(tmp_path / "guest").publish_initrd(RECORD, b"cpio")


def test_lock_held_by_another_past_the_deadline_raises(store: Store) -> None:
    with store.lock("kernel", deadline_s=1):
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError) as caught, store.lock("kernel", deadline_s=0.1):
            pytest.fail("taken twice")

    assert caught.value.deadline_s == 0.1
    assert time.monotonic() - started < 5


def test_lock_of_a_process_that_died_is_free(store: Store) -> None:
    program = (
        "import os, sys; from pathlib import Path; from casemate.guest.store import Store\n"
        "lock = Store(Path(sys.argv[1])).lock('kernel', deadline_s=5); lock.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(store.root)], check=False)

    with store.lock("kernel", deadline_s=0.5):
        pass


def test_lock_lets_one_in_at_a_time(store: Store) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with store.lock("kernel", deadline_s=20):
            inside += 1
            most = max(most, inside)
            os.sched_yield()
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == 1
