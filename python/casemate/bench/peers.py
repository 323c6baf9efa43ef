"""Peers that are built from the sources beside the package: what they are, how they are built, why one is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["SOURCES", "build_go", "build_rust", "version_of"]

SOURCES = Path(__file__).resolve().parents[3] / "benches" / "peers"
"""Sources of the peers; they are in the repository, not in a wheel."""

BUILD_LIMIT_S = 1800.0


def build_rust(cache: Path, absent: dict[str, str]) -> Path | None:
    """The Rust peers' program, or None with the reason in ``absent``. Blocks: for a build, minutes the first time."""
    names = ("raw", "rust")
    # A directory of its own: another build of the tree would make this one wait.
    target = Path(os.environ.get("CARGO_TARGET_DIR") or cache) / "peers"
    command = ["cargo", "build", "--quiet", "--release", "--locked", "--target-dir", str(target)]
    if not _built(command, SOURCES / "rust", names, absent):
        return None
    return target / "release" / "casemate-peer"


def build_go(cache: Path, absent: dict[str, str]) -> Path | None:
    """The Go peer's program, or None with the reason in ``absent``. Blocks: for a build, a minute the first time."""
    program = cache / "peers" / "go-peer"
    command = ["go", "build", "-mod=readonly", "-o", str(program), "."]
    return program if _built(command, SOURCES / "go", ("go",), absent) else None


def version_of(*command: str) -> str:
    """What a tool calls its version, without its name."""
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.split()[2 if command[0] == "go" else 1]


def _built(command: list[str], directory: Path, names: tuple[str, ...], absent: dict[str, str]) -> bool:
    reason = _reason(command, directory)
    if reason is not None:
        absent.update(dict.fromkeys(names, reason))
    return reason is None


def _reason(command: list[str], directory: Path) -> str | None:
    """Build; why it could not be."""
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]} on PATH"
    if not directory.is_dir():
        return "its sources are not beside the package; use a checkout of the repository"
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=False, timeout=BUILD_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"it was not built within {BUILD_LIMIT_S:.0f} s"
    return None if done.returncode == 0 else f"could not be built: {done.stderr.strip()[-200:]}"
