"""A disk that is full at any write: a typed error, nothing half-made, and the store works again once there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casemate import images
from casemate.config.settings import Settings
from casemate.errors import ResourceExhaustedError
from casemate.images import store as image_store
from tests.support import fake_registry
from tests.support.oci import Layout, docker_archive_files, tar

pytestmark = [pytest.mark.root, pytest.mark.erofs]

FILES = {f"dir{number}/file": os.urandom(20_000) for number in range(6)}
Resize = Callable[..., None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Settings, Resize]]:
    """Settings whose cache is a small tmpfs, and how to change its size."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "casemate-test", path], check=True)

    def resize(**options: int) -> None:
        words = ",".join(f"{name}={value}" for name, value in options.items())
        subprocess.run(["mount", "-o", f"remount,{words}", path], check=True)

    yield Settings(cache_root=path / "cache", state_root=tmp_path / "state", docker_config=tmp_path), resize
    subprocess.run(["umount", path], check=True)


@pytest.fixture(params=["oci", "docker-archive", "registry"])
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same image in each of its places."""
    layout = Layout()
    descriptor = layout.add_image([{"low": b"1"}, FILES], tag="1", compress=True)
    if request.param == "oci":
        yield f"oci:{layout.write(tmp_path / 'app')}"
    elif request.param == "docker-archive":
        path = tmp_path / "app.tar"
        path.write_bytes(tar(docker_archive_files([{"low": b"1"}, FILES])))
        yield f"docker-archive:{path}"
    else:
        with fake_registry.running() as registry:
            registry.add(layout, descriptor, "1")
            yield f"docker://{registry.address}/app:1"


def left(settings: Settings) -> list[str]:
    """What lies in the store beside its locks and empty directories."""
    root = settings.cache_root / "images"
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and "locks" not in path.parts
    )


def put_another(settings: Settings, tmp_path: Path) -> images.Image:
    other = Layout()
    other.add_image([{"other": b"o"}], tag="1")
    return images.resolve(f"oci:{other.write(tmp_path / 'other')}", settings=settings)


@pytest.mark.parametrize("option", ["size", "nr_inodes"])
def test_resolve_when_the_disk_is_full_at_each_write_then_typed_and_the_store_stays_whole(
    small_disk: tuple[Settings, Resize], reference: str, option: str, tmp_path: Path
) -> None:
    settings, resize = small_disk
    resize(size=8 << 20, nr_inodes=1000)
    before = put_another(settings, tmp_path)
    kept = left(settings)
    used = os.statvfs(settings.cache_root)
    used_now = {
        "size": (used.f_blocks - used.f_bfree) * used.f_bsize,
        "nr_inodes": used.f_files - used.f_ffree,
    }
    step = {"size": 8192, "nr_inodes": 1}[option]
    failed, made = 0, before
    for limit in range(used_now[option], used_now[option] + 200 * step, step):
        resize(**{option: limit})
        try:
            made = images.resolve(reference, settings=settings)
        except ResourceExhaustedError:
            failed += 1
            assert left(settings) == kept
            assert images.list_images(settings) == [before]
            assert images.resolve(before.name, settings=settings) == before
        else:
            break
    assert failed > 5 and made != before
    assert made.rootfs.stat().st_size == made.size_bytes
    assert images.resolve(made.name, settings=settings) == made


def test_remove_when_the_disk_is_full_then_it_frees_room(
    small_disk: tuple[Settings, Resize], tmp_path: Path
) -> None:
    settings, resize = small_disk
    resize(size=8 << 20)
    made = put_another(settings, tmp_path)
    filler = settings.cache_root / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with pytest.raises(ResourceExhaustedError):
        image_store.Store(settings).set_name("another", made.digest)
    assert sorted(image_store.Store(settings).names()) == [made.name]
    images.remove(made.name, settings, force=True)
    assert images.list_images(settings) == []


def test_resolve_when_the_cache_can_only_be_read_then_what_is_stored_is_found(
    small_disk: tuple[Settings, Resize], tmp_path: Path
) -> None:
    settings, resize = small_disk
    resize(size=8 << 20)
    made = put_another(settings, tmp_path)
    locks = settings.cache_root / "images/locks"
    # With its lock file, and without.
    for _ in range(2):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert images.resolve(made.name, settings=settings) == made
        assert images.resolve(f"oci:{tmp_path / 'other'}", settings=settings) == made
        subprocess.run(["mount", "-o", "remount,rw", tmp_path / "disk"], check=True)
        (locks / made.digest.removeprefix("sha256:")).unlink(missing_ok=True)
