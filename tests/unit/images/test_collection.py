"""What the collector takes and what it leaves; removal of what a sandbox uses."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from casemate import images
from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError, InvalidStateError
from casemate.images import collection
from casemate.images.disk import try_locked
from casemate.images.store import ImageRecord, Store
from casemate.images.types import ImageConfig
from casemate.persist.record import ContainerRecord
from casemate.persist.store import SandboxDirectory
from casemate.types import SandboxId
from tests.unit.persist.test_store import record as sandbox_record

OLD, USED, NEW = (f"sha256:{digits * 32}" for digits in ("aa", "bb", "cc"))
DAY_S = 86400.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_root=tmp_path / "cache", state_root=tmp_path / "state")


@pytest.fixture
def store(settings: Settings) -> Store:
    """Three images: one old, one as old that a sandbox uses, one of an hour ago."""
    store = Store(settings)
    for digest, name, age_s in (
        (OLD, "old:1", 40 * DAY_S),
        (USED, "used:1", 40 * DAY_S),
        (NEW, "new:1", 5000.0),
    ):
        put(store, digest, name)
        age(settings, digest, age_s)
    return store


def put(store: Store, digest: str, name: str) -> None:
    def fill(work: Path) -> ImageRecord:
        (work / "image/rootfs.erofs").write_bytes(b"data")
        return ImageRecord(digest=digest, config=ImageConfig(), fstype="erofs", size_bytes=4, layers=())

    store.make(digest, fill)
    store.set_name(name, digest)


def age(settings: Settings, digest: str, age_s: float) -> None:
    path = settings.cache_root / "images" / digest.replace(":", "-") / "record.json"
    os.utime(path, (time.time() - age_s,) * 2)


def use_it(settings: Settings, digest: str, name: str = "user") -> SandboxDirectory:
    directory = SandboxDirectory.take(settings, SandboxId(name))
    container = ContainerRecord(
        id="c",
        image="x",
        image_digest=digest,
        process=sandbox_record().containers[0].process,
        state=sandbox_record().state,
        created_unix_ns=1,
    )
    directory.write(replace(sandbox_record(), containers=(container,)))
    return directory


def names(settings: Settings) -> list[str]:
    return [image.name for image in images.list_images(settings)]


def test_collect_garbage_when_some_are_old_then_those_that_no_sandbox_uses(
    settings: Settings, store: Store
) -> None:
    user = use_it(settings, USED)
    assert images.collect_garbage(settings, dry_run=True).removed == ("old:1",)
    assert names(settings) == ["new:1", "old:1", "used:1"]
    assert images.collect_garbage(settings) == images.CollectReport(removed=("old:1",), freed_bytes=4, kept=2)
    assert names(settings) == ["new:1", "used:1"] and sorted(store.names()) == ["new:1", "used:1"]
    user.remove()
    assert images.collect_garbage(settings, older_than_s=0).removed == ("new:1", "used:1")
    assert names(settings) == [] and os.listdir(settings.cache_root / "images/work") == []


def test_collect_garbage_when_an_image_was_used_in_the_last_hour_then_it_stays(
    settings: Settings, store: Store
) -> None:
    for name in ("old:1", "used:1", "new:1"):
        assert images.resolve(name, settings=settings).name == name
    assert images.collect_garbage(settings, older_than_s=0).removed == ()


def test_collect_when_somebody_is_about_to_attach_it_then_it_stays(settings: Settings, store: Store) -> None:
    used_before = time.time() - DAY_S
    with try_locked(settings.cache_root / "images/locks" / OLD[7:], shared=True) as looking:
        assert looking is not None
        assert not store.collect(OLD, used_before=used_before)
    # What was old when the collector looked, and was used before it had the lock.
    store.use(OLD)
    assert not store.collect(OLD, used_before=used_before)
    assert store.collect(USED, used_before=used_before)
    assert store.use(USED) is None and names(settings) == ["new:1", "old:1"]


def test_collect_garbage_when_several_collect_and_start_then_no_start_loses_its_image(
    settings: Settings, store: Store
) -> None:
    failures: list[str] = []
    gate = threading.Barrier(4)

    def collect() -> None:
        gate.wait(10)
        for _ in range(20):
            images.collect_garbage(settings)

    def start(number: int) -> None:
        gate.wait(10)
        for turn in range(20):
            name, digest = f"{number}:{turn}", f"sha256:{number}{turn:063x}"
            put(store, digest, name)
            image = images.resolve(name, settings=settings)
            failures.extend([name] * (not image.rootfs.exists()))

    threads = [threading.Thread(target=collect) for _ in range(2)]
    threads += [threading.Thread(target=start, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25)
    assert failures == [] and len(names(settings)) == 41


def test_collect_garbage_when_a_living_sandbox_can_not_be_read_then_nothing_is_removed(
    settings: Settings, store: Store
) -> None:
    user = use_it(settings, NEW)
    (user.path / "state.json").write_bytes(b'{"version": 9999}')
    with pytest.raises(
        InvalidStateError, match="sandbox user is alive and what it uses can't be read"
    ) as caught:
        images.collect_garbage(settings)
    assert caught.value.sandbox_id == "user"
    assert len(names(settings)) == 3
    user.release()
    assert images.collect_garbage(settings).removed == ("old:1", "used:1")


def test_collect_garbage_when_parts_are_old_then_those_that_nobody_works_on(
    settings: Settings, store: Store
) -> None:
    paths = [store.part(digits * 32) for digits in ("aa", "bb", "cc")]
    for path, age_s in zip(paths, (40 * DAY_S, 40 * DAY_S, 60.0), strict=True):
        path.write_bytes(b"12345")
        os.utime(path, (time.time() - age_s,) * 2)
    with try_locked(paths[1]) as held:
        assert held is not None
        assert images.collect_garbage(settings).freed_bytes == 5 + 2 * 4
    assert [path.exists() for path in paths] == [False, True, True]


def test_collect_garbage_when_an_old_one_is_damaged_then_it_goes_too(
    settings: Settings, store: Store
) -> None:
    root = settings.cache_root / "images"
    (root / OLD.replace(":", "-") / "record.json").write_bytes(b"{")
    age(settings, OLD, 40 * DAY_S)
    (root / USED.replace(":", "-") / "record.json").unlink()
    os.utime(root / USED.replace(":", "-"), (time.time() - 40 * DAY_S,) * 2)
    assert images.collect_garbage(settings) == images.CollectReport(
        removed=(OLD, USED), freed_bytes=8, kept=1
    )
    assert store.digests() == [NEW] and store.names() == {"new:1": NEW}


@pytest.mark.parametrize("age_s", [-1.0, float("nan")])
def test_collect_garbage_when_the_age_is_wrong_then_error(settings: Settings, age_s: float) -> None:
    with pytest.raises(InvalidConfigError, match="0 or more seconds"):
        images.collect_garbage(settings, older_than_s=age_s)


def test_find_users_when_sandboxes_share_an_image_then_both(settings: Settings) -> None:
    held = [use_it(settings, USED, name) for name in ("a", "b")]
    assert collection.find_users(settings) == {USED: ("a", "b")}
    for directory in held:
        directory.remove()


def test_remove_when_a_sandbox_uses_it_then_refused_unless_forced_or_another_name_is_left(
    settings: Settings, store: Store
) -> None:
    user = use_it(settings, USED)
    with pytest.raises(InvalidStateError, match="used by sandbox user"):
        images.remove("used:1", settings)
    store.set_name("used:2", USED)
    images.remove("used:1", settings)
    with pytest.raises(InvalidStateError, match="used by sandbox user"):
        images.remove("used:2", settings)
    images.remove("used:2", settings, force=True)
    assert names(settings) == ["new:1", "old:1"]
    user.remove()
