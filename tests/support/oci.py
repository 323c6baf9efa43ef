"""OCI layouts and ``docker save`` archives from dictionaries of files. Written apart from the code under test."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
TIME = 1_600_000_000

Json = dict[str, object]
Files = Mapping[str, bytes | tarfile.TarInfo]
"""Content of a file, or a member as it is; a name that ends in a slash is a directory."""


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def member(kind: bytes, *, link: str = "", mode: int = 0o755, **fields: int) -> tarfile.TarInfo:
    """A member that is not a plain file: ``tarfile.SYMTYPE`` and the like."""
    info = tarfile.TarInfo()
    info.type, info.linkname, info.mode, info.mtime = kind, link, mode, TIME
    for name, value in fields.items():
        setattr(info, name, value)
    return info


def tar(files: Files) -> bytes:
    """An uncompressed tar with these members in this order."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else member(tarfile.REGTYPE, mode=0o644)
            info.name = name.rstrip("/")
            if isinstance(content, bytes):
                info.size = len(content)
                if name.endswith("/"):
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return output.getvalue()


class Layout:
    """An OCI layout under construction: blobs, then one entry of the index an image."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: list[Json] = []

    def add_blob(self, data: bytes, media_type: str) -> Json:
        digest = sha256(data)
        self.blobs[digest.removeprefix("sha256:")] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_json(self, document: object, media_type: str) -> Json:
        return self.add_blob(json.dumps(document).encode(), media_type)

    def add_image(
        self,
        layers: Sequence[Files | bytes],
        *,
        tag: str | None = None,
        config: Json | None = None,
        compress: bool = False,
        architecture: str = "amd64",
        layer_type: str | None = None,
        manifest_type: str = MANIFEST,
        listed: bool = True,
        **changes: object,
    ) -> Json:
        """Add an image; its descriptor comes back. ``changes`` go into its configuration document."""
        tars = [layer if isinstance(layer, bytes) else tar(layer) for layer in layers]
        packed = [gzip.compress(data, 1, mtime=0) if compress else data for data in tars]
        kind = layer_type or (f"{LAYER}+gzip" if compress else LAYER)
        document = {
            "architecture": architecture,
            "os": "linux",
            "created": "2026-01-02T03:04:05Z",
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in tars]},
        } | changes
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": self.add_json(document, CONFIG),
            "layers": [self.add_blob(data, kind) for data in packed],
        }
        descriptor = self.add_json(manifest, manifest_type)
        if listed:
            self.list_descriptor(descriptor, tag=tag, architecture=architecture)
        return descriptor

    def list_descriptor(self, descriptor: Json, *, tag: str | None, architecture: str | None = None) -> None:
        entry = dict(descriptor)
        if architecture is not None:
            entry["platform"] = {"os": "linux", "architecture": architecture}
        if tag is not None:
            entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        self.manifests.append(entry)

    def files(self) -> dict[str, bytes]:
        index = {"schemaVersion": 2, "manifests": self.manifests}
        return {
            "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
            "index.json": json.dumps(index).encode(),
            **{f"blobs/sha256/{digest}": data for digest, data in self.blobs.items()},
        }

    def write(self, directory: Path) -> Path:
        """Write it as a directory."""
        for name, data in self.files().items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return directory

    def write_archive(self, path: Path) -> Path:
        """Write it as an ``oci-archive``."""
        path.write_bytes(tar(self.files()))
        return path


def docker_archive_files(
    layers: Sequence[Files], *, tags: Sequence[str] = ("app:1",), config: Json | None = None
) -> dict[str, bytes | tarfile.TarInfo]:
    """Members of a ``docker save`` archive of the old form."""
    tars = [tar(layer) for layer in layers]
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in tars]},
    }
    data = json.dumps(document).encode()
    name = f"{sha256(data).removeprefix('sha256:')}.json"
    members: dict[str, bytes | tarfile.TarInfo] = {name: data}
    names = []
    for number, layer in enumerate(tars):
        names.append(f"layer{number}/layer.tar")
        members[names[-1]] = layer
    members["manifest.json"] = json.dumps(
        [{"Config": name, "RepoTags": list(tags), "Layers": names}]
    ).encode()
    return members
