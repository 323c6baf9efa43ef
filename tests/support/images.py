"""Images that tests run."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from casemate.bench.layout import write_layout
from scripts.debian_image import build_debian_image

__all__ = ["build_busybox_layout", "build_debian_image"]

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
GROUP = b"root:x:0:\nnogroup:x:65534:\n"


def build_busybox_layout(layout: Path) -> Path:
    """Make an image of a static busybox with a link for each of its commands; return ``layout``."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "tests that use this image carry the mark busybox"
    commands = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    layout.parent.mkdir(parents=True, exist_ok=True)
    layer = layout.parent / f"{layout.name}.tar"
    with tarfile.open(layer, "w") as archive:
        for name, mode in (
            ("bin", 0o755),
            ("etc", 0o755),
            ("root", 0o700),
            ("tmp", 0o1777),
            ("proc", 0o755),
            ("sys", 0o755),
            ("dev", 0o755),
        ):
            archive.addfile(_member(name, tarfile.DIRTYPE, mode))
        with Path(busybox).open("rb") as file:
            program = _member("bin/busybox", tarfile.REGTYPE, 0o755)
            program.size = os.fstat(file.fileno()).st_size
            archive.addfile(program, file)
        for command in commands:
            if command != "busybox":
                link = _member(f"bin/{command}", tarfile.SYMTYPE, 0o777)
                link.linkname = "busybox"
                archive.addfile(link)
        for name, data in (("etc/passwd", PASSWD), ("etc/group", GROUP)):
            member = _member(name, tarfile.REGTYPE, 0o644)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    write_layout(layout, layer, tag="busybox", command=["/bin/sh"], environment=["PATH=/bin"])
    return layout


def _member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.mode = mode
    return member
