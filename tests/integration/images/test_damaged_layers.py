"""Layers and archives damaged in any place: the one error, or a tree; nothing outside, nothing else."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casemate import _core
from casemate.errors import ImageError, NotFoundError
from casemate.images.archive import find_in_docker_archive, opened_archive
from tests.support.hostile import IMAGES, Scratch, packed
from tests.support.oci import Files, docker_archive_files, member, tar

pytestmark = pytest.mark.root

WHOLE: Files = {
    "a/": b"",
    "a/file": b"data" * 300,
    "a/link": member(tarfile.SYMTYPE, link="file"),
    "a/hard": member(tarfile.LNKTYPE, link="a/file"),
    "n" * 180: b"a long name",
    "dev": member(tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a/.wh.gone": b"",
}

Changes = st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=8)


def make_directory() -> Path:
    """A directory for one example; in memory where there is such a place, since thousands are removed again."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="casemate-damaged-", dir=memory if memory.is_dir() else None))


def changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    """Bytes replaced, then every header's checksum made right, so that the change is looked at."""
    out = bytearray(data)
    for place, value in changes:
        out[place % len(out)] = value
    for start in range(0, len(out) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            out[start + 148 : start + 156] = b" " * 8
            out[start + 148 : start + 156] = f"{sum(out[start : start + 512]):06o}\0 ".encode()
    return bytes(out)


def unpack(data: bytes, scratch: Scratch, directory: Path) -> None:
    """Unpack it; anything but success and ImageError is a finding."""
    path = directory / "layer"
    path.write_bytes(data)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    try:
        _core.unpack_layer(
            path, scratch.tree, media_type="", digest=digest, max_bytes=1 << 20, max_entries=500
        )
    except ImageError:
        pass


@given(seed=st.sampled_from([*IMAGES, "whole"]), changes=Changes, cut=st.integers(0, 3000))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_unpack_layer_when_headers_are_changed_then_one_error_or_a_tree_and_nothing_outside(
    seed: str, changes: list[tuple[int, int]], cut: int
) -> None:
    directory = make_directory()
    try:
        scratch = Scratch(directory / "scratch")
        before = scratch.outside()
        layers = (
            [tar(WHOLE)] if seed == "whole" else [packed(layer) for layer in IMAGES[seed].layers(scratch)]
        )
        for layer in layers:
            data = changed(layer[:200_000], changes)
            unpack(data[: len(data) - cut % 512], scratch, directory)
        assert scratch.outside() == before
    finally:
        shutil.rmtree(directory)


@given(data=st.binary(max_size=3000), form=st.sampled_from(["plain", "gzip", "damaged gzip", "zstd"]))
@settings(max_examples=100)
def test_unpack_layer_when_it_is_noise_then_no_other_error(data: bytes, form: str) -> None:
    noise = {
        "plain": data,
        "gzip": gzip.compress(data),
        "damaged gzip": b"\x1f\x8b\x08" + data,
        "zstd": b"\x28\xb5\x2f\xfd" + data,
    }[form]
    directory = make_directory()
    try:
        unpack(noise, Scratch(directory / "scratch"), directory)
    finally:
        shutil.rmtree(directory)


@given(changes=Changes, cut=st.integers(0, 15_000), compress=st.booleans())
@settings(max_examples=200)
def test_docker_archive_when_bytes_are_changed_then_image_error_or_the_image(
    changes: list[tuple[int, int]], cut: int, compress: bool
) -> None:
    whole = changed(tar(docker_archive_files([WHOLE])), changes)
    data = whole[: len(whole) - cut]
    directory = make_directory()
    try:
        path = directory / "app.tar"
        path.write_bytes(gzip.compress(data, 1) if compress else data)
        with opened_archive(path, reference="app") as files:
            candidate = find_in_docker_archive(
                files, path="app", tag=None, reference="app", architecture="amd64"
            )
            plan = candidate.prepare(directory, lambda done, total: None)
            assert [layer.size_bytes for layer in plan.layers] == [
                layer.path.stat().st_size for layer in plan.layers
            ]
    except (ImageError, NotFoundError):
        pass
    finally:
        shutil.rmtree(directory)
