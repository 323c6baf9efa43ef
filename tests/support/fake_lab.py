"""A stand-in for the lab's QEMU: speaks on the same descriptors and disks, by a script that the test chooses."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["write_fake_qemu"]

HEAD = f"""#!{sys.executable}
import io, os, sys, tarfile, time
console, job = 3, 4
drives = [word for word in sys.argv if word.startswith("file=")]
disk = next(word for word in drives if ",id=results," in word).split(",")[0].removeprefix("file=")

def say(text):
    os.write(console, (text + "\\r\\n").encode())

def leave(**files):
    with tarfile.open(disk, "w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))

"""


def write_fake_qemu(path: Path, script: str) -> str:
    """Write the program that runs ``script``, Python with ``say``, ``leave``, ``job``; return its path."""
    path.write_text(HEAD + script, "utf-8")
    path.chmod(0o755)
    return str(path)
