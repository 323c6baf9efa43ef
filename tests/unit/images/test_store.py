"""The store: made once, whole or not at all, names beside it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from casemate.config.settings import Settings
from casemate.errors import NotFoundError
from casemate.images.store import ImageRecord, Store
from casemate.images.types import ImageConfig

DIGEST = f"sha256:{'ab' * 32}"
OTHER = f"sha256:{'ac' * 32}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Settings(cache_root=tmp_path))


def record(digest: str = DIGEST, size_bytes: int = 4) -> ImageRecord:
    return ImageRecord(
        digest=digest, config=ImageConfig(command=("sh",)), fstype="erofs", size_bytes=size_bytes, layers=()
    )


def fill(work: Path, digest: str = DIGEST) -> ImageRecord:
    (work / "tree").mkdir()
    (work / "image" / "rootfs.erofs").write_bytes(b"data")
    return record(digest)


def names_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "images").iterdir())


def test_make_when_new_then_stored_and_nothing_else(store: Store, tmp_path: Path) -> None:
    made = store.make(DIGEST, fill)
    assert store.load(DIGEST) == made
    assert store.image(made, "app:1").rootfs.read_bytes() == b"data"
    assert names_in(tmp_path) == ["locks", f"sha256-{'ab' * 32}", "work"]
    assert os.listdir(tmp_path / "images/work") == []
    assert (tmp_path / "images").stat().st_mode & 0o777 == 0o700


def test_make_when_there_already_then_not_again(store: Store) -> None:
    store.make(DIGEST, fill)

    def fail(work: Path) -> ImageRecord:
        raise AssertionError(work)

    assert store.make(DIGEST, fail) == record()


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_make_when_fill_fails_then_nothing_is_left(
    store: Store, tmp_path: Path, error: BaseException
) -> None:
    def fail(work: Path) -> ImageRecord:
        fill(work)
        raise error

    with pytest.raises(type(error)):
        store.make(DIGEST, fail)
    assert store.load(DIGEST) is None
    assert names_in(tmp_path) == ["locks", "work"] and os.listdir(tmp_path / "images/work") == []


def test_make_when_several_ask_at_once_then_filled_once(store: Store) -> None:
    filled: list[Path] = []
    gate = threading.Barrier(4)
    results: list[ImageRecord] = []

    def slow_fill(work: Path) -> ImageRecord:
        filled.append(work)
        return fill(work)

    def ask() -> None:
        gate.wait(10)
        results.append(store.make(DIGEST, slow_fill))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [record()] * 4 and len(filled) == 1


def test_sweep_when_a_process_died_then_its_work_goes_and_that_of_the_living_stays(
    store: Store, tmp_path: Path
) -> None:
    store.make(OTHER, lambda work: fill(work, OTHER))
    dead = tmp_path / "images/work" / f"{'cd' * 32}.dead"
    (dead / "tree/deep").mkdir(parents=True)

    def fill_and_sweep(work: Path) -> ImageRecord:
        store.sweep()
        assert work.exists() and not dead.exists()
        return fill(work)

    store.make(DIGEST, fill_and_sweep)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("record.json", b"{"),
        ("record.json", b"{}"),
        ("record.json", None),
        ("rootfs.erofs", b"cut"),
        ("rootfs.erofs", None),
    ],
)
def test_make_when_the_stored_one_is_damaged_then_made_again(
    store: Store, tmp_path: Path, name: str, content: bytes | None
) -> None:
    store.make(DIGEST, fill)
    path = tmp_path / "images" / f"sha256-{'ab' * 32}" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert store.load(DIGEST) is None
    assert store.make(DIGEST, fill) == store.load(DIGEST) == record()


def test_find_when_named_then_by_name_digest_or_prefix(store: Store) -> None:
    store.make(DIGEST, fill)
    store.make(OTHER, lambda work: fill(work, OTHER))
    store.set_name("app:latest", DIGEST)
    for text in ("app", "app:latest", DIGEST, "ab" * 32, "ab" * 6):
        image = store.find(text)
        assert image is not None and (image.digest, image.name) == (DIGEST, "app:latest"), text
    for text in ("ap", "ab" * 5, "app:1", "ff" * 32):
        assert store.find(text) is None, text


def test_set_name_when_it_meant_another_then_moved(store: Store) -> None:
    store.make(DIGEST, fill)
    store.make(OTHER, lambda work: fill(work, OTHER))
    for digest in (DIGEST, OTHER):
        store.set_name("app:latest", digest)
    assert [(image.name, image.digest) for image in store.images()] == [("", DIGEST), ("app:latest", OTHER)]


def test_remove_when_other_names_are_left_then_only_the_name_goes(store: Store) -> None:
    store.make(DIGEST, fill)
    store.set_name("app:1", DIGEST)
    store.set_name("app:latest", DIGEST)
    store.remove("app")
    assert [image.name for image in store.images()] == ["app:1"]
    store.remove("app:1")
    assert store.images() == [] and store.load(DIGEST) is None


def test_remove_when_by_digest_then_all_names_go(store: Store, tmp_path: Path) -> None:
    store.make(DIGEST, fill)
    store.set_name("app:1", DIGEST)
    store.set_name("app:2", DIGEST)
    store.remove(DIGEST)
    assert store.images() == [] and store.names() == {}
    assert names_in(tmp_path) == ["locks", "names.json", "work"]


def test_remove_when_unknown_then_error_names_those_there_are(store: Store) -> None:
    store.make(DIGEST, fill)
    store.set_name("app:1", DIGEST)
    with pytest.raises(NotFoundError, match=r"image 'other'.*stored are app:1"):
        store.remove("other")
