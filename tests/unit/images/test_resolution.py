"""References that name nothing, or nothing that can be unpacked; nothing is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casemate import images
from casemate.config.settings import Settings
from casemate.errors import ImageError, InvalidConfigError, NotFoundError, UnsupportedError
from casemate.images import resolution
from casemate.images.store import ImageRecord, Store
from casemate.images.types import ImageConfig
from tests.support.oci import Layout, tar

DIGEST = f"sha256:{'ab' * 32}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_root=tmp_path / "cache")


def put(settings: Settings, digest: str, name: str) -> None:
    def fill(work: Path) -> ImageRecord:
        (work / "image/rootfs.erofs").write_bytes(b"data")
        return ImageRecord(digest=digest, config=ImageConfig(), fstype="erofs", size_bytes=4, layers=())

    store = Store(settings)
    store.make(digest, fill)
    store.set_name(name, digest)


def test_public_names_then_all_resolve() -> None:
    assert sorted(set(images.__all__)) == sorted(images.__all__)
    for name in images.__all__:
        assert getattr(images, name) is not None
    assert images.resolve is resolution.resolve
    with pytest.raises(AttributeError, match="nothing"):
        _ = images.nothing


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        ("absent", NotFoundError, "neither an existing path nor a stored image; none is stored"),
        ("./absent", NotFoundError, "neither an existing path nor a stored image"),
        ("oci:/absent", NotFoundError, "layout '/absent' does not exist"),
        ("oci-archive:/absent", NotFoundError, "archive '/absent' does not exist"),
        ("docker-archive:/absent", NotFoundError, "archive '/absent' does not exist"),
        ("oci:", InvalidConfigError, "no path"),
        ("docker://X", InvalidConfigError, "repository 'X'"),
    ],
)
def test_resolve_when_nothing_is_there_then_typed_error(
    settings: Settings, reference: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        images.resolve(reference, settings=settings)
    assert not settings.cache_root.exists()


def test_resolve_when_unknown_name_then_known_ones_are_named(settings: Settings) -> None:
    put(settings, DIGEST, "debian:12")
    with pytest.raises(NotFoundError, match="stored are debian:12"):
        images.resolve("ubuntu", settings=settings)


def test_resolve_when_path_is_no_image_then_error_unless_a_stored_one_has_the_name(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debian").mkdir()
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "files.tar").write_bytes(tar({"a": b""}))
    with pytest.raises(ImageError, match="not an OCI layout"):
        images.resolve("debian", settings=settings)
    with pytest.raises(ImageError, match="not a tar file"):
        images.resolve("./file", settings=settings)
    with pytest.raises(ImageError, match=r"neither oci-layout nor manifest\.json"):
        images.resolve("./files.tar", settings=settings)
    put(settings, DIGEST, "debian:latest")
    assert images.resolve("debian", settings=settings).digest == DIGEST


def test_resolve_when_layout_is_stored_then_layers_are_not_read(settings: Settings, tmp_path: Path) -> None:
    layout = Layout()
    descriptor = layout.add_image([{"a": b""}], tag="1")
    root = layout.write(tmp_path / "app")
    put(settings, str(descriptor["digest"]), "other:1")
    for name, data in layout.blobs.items():
        if descriptor["digest"] != f"sha256:{name}":
            assert data
            (root / "blobs/sha256" / name).unlink()
    image = images.resolve(f"oci:{root}", settings=settings)
    assert (image.name, image.digest) == ("app:1", descriptor["digest"])
    assert [image.name for image in images.list_images(settings)] == ["app:1", "other:1"]


def test_resolve_when_stored_but_manifest_is_changed_then_error(settings: Settings, tmp_path: Path) -> None:
    layout = Layout()
    digest = str(layout.add_image([{"a": b""}])["digest"])
    root = layout.write(tmp_path / "app")
    put(settings, digest, "app:latest")
    path = root / "blobs/sha256" / digest.removeprefix("sha256:")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ImageError, match="damaged: its digest is") as caught:
        images.resolve(str(root), settings=settings)
    assert caught.value.digest == digest


def test_resolve_when_not_root_then_unsupported(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout()
    layout.add_image([{"a": b""}])
    layout.write(tmp_path / "app")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnsupportedError, match="needs root") as caught:
        images.resolve(str(tmp_path / "app"), settings=settings)
    assert caught.value.capability == "root"
    assert not settings.cache_root.exists()
