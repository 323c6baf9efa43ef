"""Write an OCI image layout with one layer, from a tar file."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_layout"]

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_layout(
    layout: Path, layer: Path, *, tag: str, command: Sequence[str], environment: Sequence[str] = ()
) -> None:
    """Make the directory ``layout`` with the uncompressed tar file ``layer``, which is moved into it. Blocks: reads the layer once."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with layer.open("rb") as file:
        layer_digest = hashlib.file_digest(file, "sha256").hexdigest()
    layer_size_bytes = layer.stat().st_size
    shutil.move(layer, blobs / layer_digest)
    config: dict[str, object] = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Cmd": list(command), "Env": list(environment), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
    }
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _write_blob(blobs, config) | {"mediaType": "application/vnd.oci.image.config.v1+json"},
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": f"sha256:{layer_digest}",
                "size": layer_size_bytes,
            }
        ],
    }
    reference = _write_blob(blobs, manifest) | {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [reference]}), "utf-8")
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}), "utf-8")


def _write_blob(blobs: Path, document: dict[str, object]) -> dict[str, object]:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}
