"""Crafted images: each reaches out of a naive unpacker's tree, none out of ours, and the store is as before."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from casemate import _core, images
from casemate.config.settings import Settings
from casemate.errors import ImageError
from tests.support import hostile
from tests.support.hostile import IMAGES, LIMIT_BYTES, Scratch, unpack_naively
from tests.support.oci import Files, Layout

pytestmark = [pytest.mark.root, pytest.mark.erofs]

TAKEN = {name: image for name, image in IMAGES.items() if not image.refused}
REFUSED = {name: image for name, image in IMAGES.items() if image.refused}
ESCAPING = {name: image for name, image in IMAGES.items() if image.harm is None}
EXHAUSTING = {name: image for name, image in IMAGES.items() if image.harm is not None}


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path / "scratch")


@pytest.fixture
def settings(scratch: Scratch, tmp_path: Path) -> Settings:
    return Settings(
        cache_root=scratch.root / "cache", state_root=tmp_path / "state", max_image_bytes=LIMIT_BYTES
    )


def layers_of(name: str, scratch: Scratch) -> list[bytes]:
    return [hostile.packed(layer) for layer in IMAGES[name].layers(scratch)]


def layout_of(name: str, scratch: Scratch, tmp_path: Path) -> str:
    layout = Layout()
    layout.add_image(layers_of(name, scratch), tag="1", compress=True)
    return f"oci:{layout.write(tmp_path / 'image')}"


def unpack_ours(layers: list[bytes], tree: Path, tmp_path: Path) -> None:
    for number, layer in enumerate(layers):
        path = tmp_path / f"layer{number}"
        path.write_bytes(layer)
        digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
        _core.unpack_layer(path, tree, media_type="", digest=digest, max_bytes=LIMIT_BYTES)


def test_images_then_there_are_twenty_and_more() -> None:
    assert len(IMAGES) >= 20


@pytest.mark.parametrize("name", ESCAPING)
def test_naive_unpacker_when_image_is_hostile_then_something_outside_changes(
    name: str, scratch: Scratch
) -> None:
    before = scratch.outside()
    unpack_naively(layers_of(name, scratch), scratch.tree)
    assert scratch.outside() != before


@pytest.mark.parametrize("name", EXHAUSTING)
def test_naive_unpacker_when_image_is_a_bomb_then_nothing_bounds_it(name: str, scratch: Scratch) -> None:
    with pytest.raises(IMAGES[name].harm or AssertionError):
        unpack_naively(layers_of(name, scratch), scratch.tree)


@pytest.mark.parametrize("name", TAKEN)
def test_unpack_layer_when_image_is_hostile_then_it_stays_inside(
    name: str, scratch: Scratch, tmp_path: Path
) -> None:
    before = scratch.outside()
    unpack_ours(layers_of(name, scratch), scratch.tree, tmp_path)
    assert scratch.outside() == before
    inside = IMAGES[name].inside.replace("%", str(scratch.victim))
    assert os.path.lexists(scratch.tree / inside.lstrip("/"))


@pytest.mark.parametrize("name", REFUSED)
def test_unpack_layer_when_image_is_hostile_then_refused(name: str, scratch: Scratch, tmp_path: Path) -> None:
    before = scratch.outside()
    with pytest.raises(ImageError, match=IMAGES[name].refused.replace(".", r"\.")):
        unpack_ours(layers_of(name, scratch), scratch.tree, tmp_path)
    assert scratch.outside() == before


@pytest.mark.parametrize("name", TAKEN)
def test_resolve_when_image_is_hostile_then_only_the_store_changes(
    name: str, scratch: Scratch, settings: Settings, tmp_path: Path
) -> None:
    before = scratch.outside()
    image = images.resolve(layout_of(name, scratch, tmp_path), settings=settings)
    assert image.rootfs.exists()
    assert scratch.outside() == before
    assert os.listdir(settings.cache_root / "images/work") == []


@pytest.mark.parametrize("name", REFUSED)
def test_resolve_when_image_is_refused_then_nothing_is_left_of_it(
    name: str, scratch: Scratch, settings: Settings, tmp_path: Path
) -> None:
    before = scratch.outside()
    with pytest.raises(ImageError, match=IMAGES[name].refused.replace(".", r"\.")) as caught:
        images.resolve(layout_of(name, scratch, tmp_path), settings=settings)
    assert caught.value.digest.startswith("sha256:")
    assert scratch.outside() == before
    assert os.listdir(settings.cache_root / "images/work") == [] and images.list_images(settings) == []


def test_resolve_when_accounts_are_links_to_the_hosts_then_they_are_not_read(
    scratch: Scratch, settings: Settings, tmp_path: Path
) -> None:
    layer: Files = {
        "etc/": b"",
        "etc/passwd": hostile.link(f"{scratch.victim}/secret"),
        "etc/group": hostile.link(f"../{hostile.UP}/victim/secret"),
    }
    unpack_naively([hostile.packed(layer)], scratch.tree)
    for name in ("passwd", "group"):
        assert (scratch.tree / "etc" / name).read_bytes() == b"the host's own"
    layout = Layout()
    layout.add_image([layer])
    image = images.resolve(f"oci:{layout.write(tmp_path / 'image')}", settings=settings)
    assert (image.passwd, image.group) == ("", "")
