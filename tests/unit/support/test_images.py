"""Layouts that tests and demo run are whole."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from tests.support.images import build_busybox_layout


@pytest.mark.busybox
def test_busybox_layout_when_built_twice_then_blobs_match_their_names_and_digest_is_stable(
    tmp_path: Path,
) -> None:
    first = build_busybox_layout(tmp_path / "a")
    second = build_busybox_layout(tmp_path / "b")
    assert (first / "index.json").read_bytes() == (second / "index.json").read_bytes()
    for blob in (first / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


@pytest.mark.busybox
def test_busybox_layout_then_layer_has_a_shell(tmp_path: Path) -> None:
    layout = build_busybox_layout(tmp_path / "a")
    blobs = layout / "blobs" / "sha256"
    index = json.loads((layout / "index.json").read_text("utf-8"))
    manifest = json.loads(
        (blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_text("utf-8")
    )
    with tarfile.open(blobs / manifest["layers"][0]["digest"].removeprefix("sha256:")) as layer:
        assert layer.getmember("bin/sh").linkname == "busybox"
