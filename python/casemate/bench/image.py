"""A smallest image: one static program that prints one byte."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from casemate.bench.floor import byte_program
from casemate.bench.layout import write_layout

__all__ = ["write_image"]

_EXIT = bytes.fromhex(
    "b83c000000"  # mov eax, 60 (exit)
    "31ff"  # xor edi, edi
    "0f05"  # syscall
)


def write_image(directory: Path) -> str:
    """Write an OCI layout ``directory`` whose command prints one byte; return its reference. Blocks: for file writes."""
    directory.mkdir(parents=True, exist_ok=True)
    layer = directory / "layer.tar"
    program = byte_program(_EXIT)
    with tarfile.open(layer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("byte")
        entry.mode, entry.size = 0o755, len(program)
        tar.addfile(entry, io.BytesIO(program))
    write_layout(directory, layer, tag="latest", command=["/byte"])
    return f"oci:{directory}:latest"
