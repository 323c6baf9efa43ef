"""A registry with faults, an image in it, and a cache of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate.config.settings import Settings
from tests.support import fake_registry
from tests.support.fake_registry import DATA, FakeRegistry
from tests.support.oci import Layout


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    # Pauses before a new try are multiplied too.
    return Settings(
        timeout_factor=0.1,
        cache_root=tmp_path / "cache",
        state_root=tmp_path / "state",
        docker_config=tmp_path / "docker",
    )


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry.running() as running:
        yield running
    assert running.broken == []


@pytest.fixture
def image(registry: FakeRegistry) -> str:
    """Name of an image with one large layer."""
    layout = Layout()
    registry.add(layout, layout.add_image([{"data": DATA}]), "1")
    return f"{registry.address}/team/app:1"
