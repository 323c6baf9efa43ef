"""Images for sandboxes."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from casemate.bench.layout import write_layout


@pytest.fixture
def fresh_layout(tmp_path: Path) -> Path:
    """A layout that no store has seen: one layer with random content."""
    layer = tmp_path / "layer.tar"
    with tarfile.open(layer, "w") as archive:
        member = tarfile.TarInfo("random")
        data = os.urandom(100_000)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    write_layout(tmp_path / "layout", layer, tag="fresh", command=["/random"], environment=[])
    return tmp_path / "layout"
