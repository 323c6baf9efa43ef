"""Each step of a pull and of a removal fails, is interrupted, or ends the process: the store is whole, and the next try works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate import images
from casemate.config.settings import Settings
from casemate.errors import CasemateError
from casemate.observe import failpoints
from tests.support import fake_registry
from tests.support.oci import Layout

pytestmark = [pytest.mark.root, pytest.mark.erofs]

REMOVAL = ("image.remove", "image.removed", "image.names", "image.named")
PULL = tuple(name for name in failpoints.POINTS if name.startswith("image.") and name not in REMOVAL[:2])
ACTIONS = {"1*error(made to fail)": CasemateError, "1*cancel": KeyboardInterrupt}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_root=tmp_path / "cache", state_root=tmp_path / "state", docker_config=tmp_path)


@pytest.fixture
def image(settings: Settings, tmp_path: Path) -> Iterator[str]:
    """An image of two layers in a registry, beside another one that is stored."""
    other = Layout()
    other.add_image([{"other": b"o"}], tag="1")
    images.resolve(f"oci:{other.write(tmp_path / 'other')}", settings=settings)
    layout = Layout()
    with fake_registry.running() as registry:
        registry.add(layout, layout.add_image([{"a": b"1"}, {"b": b"2"}], compress=True), "1")
        yield f"{registry.address}/app:1"


def casemate(settings: Settings, failing: str, *words: str) -> int:
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CASEMATE_CACHE": str(settings.cache_root),
        "CASEMATE_STATE_ROOT": str(settings.state_root),
        "CASEMATE_FAILPOINTS": failing,
    }
    return subprocess.run(
        [sys.executable, "-m", "casemate", *words], env=os.environ | environment, timeout=60
    ).returncode


def check_whole(settings: Settings) -> None:
    """Whatever is listed can be started, and what was there before is."""
    listed = images.list_images(settings)
    assert "other:1" in [image.name for image in listed]
    for image in listed:
        assert image.rootfs.stat().st_size == image.size_bytes
        assert images.resolve(image.digest, settings=settings).digest == image.digest


def check_clean(settings: Settings) -> None:
    root = settings.cache_root / "images"
    assert os.listdir(root / "work") == []
    assert not (root / "parts").exists() or os.listdir(root / "parts") == []
    assert not (root / "names.json.new").exists()


@pytest.mark.parametrize("action", ACTIONS)
def test_pull_when_each_step_fails_then_the_store_is_whole_and_the_next_pull_works(
    settings: Settings, image: str, action: str
) -> None:
    for name in PULL:
        with (
            failpoints.armed(f"{name}={action}") as hits,
            pytest.raises(ACTIONS[action], match="^(made to fail)?$"),
        ):
            images.pull(image, settings=settings)
        assert hits(name) == 1, name
        check_whole(settings)
        assert os.listdir(settings.cache_root / "images/work") == [], name
        assert images.pull(image, settings=settings).name == image
        check_clean(settings)
        images.remove(image, settings)


def test_pull_when_the_process_is_killed_at_each_step_then_the_next_pull_works(
    settings: Settings, image: str
) -> None:
    for name in PULL:
        assert casemate(settings, f"{name}=kill", "pull", image) == -9, name
        check_whole(settings)
        assert images.pull(image, settings=settings).name == image
        check_clean(settings)
        images.remove(image, settings)


@pytest.mark.parametrize("action", ACTIONS)
def test_remove_when_each_step_fails_then_the_store_is_whole_and_the_next_removal_works(
    settings: Settings, image: str, action: str
) -> None:
    for name in REMOVAL:
        images.pull(image, settings=settings)
        with failpoints.armed(f"{name}={action}") as hits, pytest.raises(ACTIONS[action]):
            images.remove(image, settings)
        assert hits(name) == 1, name
        check_whole(settings)
        assert images.pull(image, settings=settings).name == image
        images.remove(image, settings)
        check_clean(settings)
        assert [one.name for one in images.list_images(settings)] == ["other:1"]


def test_remove_when_the_process_is_killed_at_each_step_then_the_store_is_whole(
    settings: Settings, image: str
) -> None:
    for name in REMOVAL:
        images.pull(image, settings=settings)
        assert casemate(settings, f"{name}=kill", "rmi", image) == -9, name
        check_whole(settings)
        assert images.pull(image, settings=settings).name == image
        images.remove(image, settings)
        check_clean(settings)
