"""Value objects of the images domain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from casemate.types import Progress

__all__ = ["Filesystem", "Image", "ImageConfig", "Phase", "Progress", "ReportProgress"]

Filesystem = Literal["erofs", "ext4"]
Phase = Literal["wait", "download", "extract", "unpack", "pack"]


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an image says of the process to run in it; empty means that it says nothing."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class Image(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image that is unpacked and ready to be attached.

    Args:
        name: One of its names, ``debian:latest``; empty when it has none.
        digest: ``sha256:…`` of its manifest (of configuration and layers for an archive of ``docker save``).
        rootfs: The read-only filesystem, a regular file.
        fstype: Filesystem in ``rootfs``.
        size_bytes: Size of ``rootfs``.
        layers: Digests of the unpacked layers (``diff_id``), lowest first.
        created: When the image was made, as it says itself (RFC 3339), or empty.
        passwd: Text of its ``/etc/passwd``, empty when it has none.
        group: Text of its ``/etc/group``, empty when it has none.
    """

    name: str
    digest: str
    config: ImageConfig
    rootfs: Path
    fstype: Filesystem
    size_bytes: int
    layers: tuple[str, ...] = ()
    created: str = ""
    passwd: str = ""
    group: str = ""


ReportProgress = Callable[[Progress], None]
"""Told of the phases ``wait`` (another process makes the image), ``download`` (from a registry) or ``extract`` (out of an archive),
``unpack`` (layers, compressed bytes) and ``pack`` (the filesystem, 0 then all)."""
