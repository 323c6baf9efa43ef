"""What goes into the lab and what comes out of it: two disks that hold tar archives, so that no daemon has to share a directory."""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from tests.lab import LabError

__all__ = ["HOME", "Job", "read_results", "write_job_disk", "write_results_disk"]

HOME = "/mnt"
"""Where the job's files lie in the lab; the job may write to ``/mnt/out``, which comes back."""

RESULTS_BYTES = 256 << 20
MIB = 1 << 20


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One command with its files.

    Args:
        command: Run in ``directory``, with nothing on its input unless it is a shell.
        files: Files and directories of the host by their place below ``/mnt``.
        limit_s: Its time.
        shell: It talks to a person.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = {}
    files: Mapping[str, Path] = {}
    directory: str = HOME
    limit_s: int = 600
    shell: bool = False

    @property
    def script(self) -> str:
        """The program that the lab runs."""
        lines = ["#!/bin/bash", f"cd {shlex.quote(self.directory)} || exit 126"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return "\n".join([*lines, f"exec {shlex.join(self.command)}", ""])


def write_job_disk(job: Job, path: Path) -> None:
    """Write the archive of ``job`` to the new file ``path``. Raises: LabError when a file of it is missing."""
    with tarfile.open(path, "w") as archive:
        script = job.script.encode()
        member = tarfile.TarInfo("job")
        member.size, member.mode = len(script), 0o755
        archive.addfile(member, io.BytesIO(script))
        for place, source in sorted(job.files.items()):
            try:
                # With the compiled Python, which is valid by its source's time: compiling is half a minute in the lab.
                archive.add(source, place, filter=_neutral)
            except FileNotFoundError as error:
                raise LabError(f"{source} is missing, which the job needs") from error
    _pad(path)


def _neutral(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _pad(path: Path) -> None:
    # A disk is made of whole blocks, and QEMU would cut the last one.
    with path.open("r+b") as file:
        size = file.seek(0, io.SEEK_END)
        file.truncate(-(-size // MIB) * MIB)


def write_results_disk(path: Path) -> None:
    """Make the disk for the results; it takes no room until it is written."""
    with path.open("xb") as file:
        file.truncate(RESULTS_BYTES)


def read_results(disk: Path, directory: Path) -> int:
    """Unpack what the job left to ``directory``, return its exit status: 124 when its time was over.

    Raises:
        LabError: The lab wrote no whole results.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(disk, "r:") as archive:
            archive.extractall(directory, filter="data")
        return int((directory / "status").read_text("ascii"))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise LabError(f"the lab left no whole results: {error}") from error
