"""How containers and VMM of a detached sandbox ended, as its keeper has written it down."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from casemate.observe.log import Log
from casemate.persist.record import ContainerRecord, SandboxRecord
from casemate.types import State

__all__ = ["END_RECORD", "EXITS", "EndRecord", "ExitRecord", "read_end", "read_exits", "with_outcomes"]

_log = Log(__name__)

END_RECORD = "end.json"
EXITS = "exits"
VERSION = 1

T = TypeVar("T", bound="ExitRecord | EndRecord")


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a container.

    Args:
        status: Exit status, 128 + n for signal n; None when it did not end by itself.
        cause: ``"exited"``, ``"vmm_ended"`` or ``"unknown"``.
        text: The cause in words.
        ended_unix_ns: When the keeper learnt of it.
        logged_bytes: Bytes of its output that went into the log. lost_bytes: Bytes that could not be written.
        log_error: Why they could not.
    """

    version: int
    container_id: str
    status: int | None
    cause: str
    text: str
    ended_unix_ns: int
    logged_bytes: int = 0
    lost_bytes: int = 0
    log_error: str | None = None


class EndRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The end of the VMM.

    Args:
        vmm_pid: Its process id.
        status: Exit status, negative for a signal.
        wanted: Whether the keeper was asked for it.
        ended_unix_ns: When.
        stderr_tail: The last of its stderr. console_tail: The last of the guest's console; 16 KiB each at most.
        problems: What the keeper could not do, one sentence each.
    """

    version: int
    vmm_pid: int
    status: int
    wanted: bool
    ended_unix_ns: int
    stderr_tail: str = ""
    console_tail: str = ""
    problems: tuple[str, ...] = ()

    def describe(self) -> str:
        """The cause in one sentence, with the last line that was written."""
        how = f"was ended by signal {-self.status}" if self.status < 0 else f"ended with status {self.status}"
        said = [line for line in self.stderr_tail.splitlines() if line.strip()]
        return f"its VMM {how}" + (f": {said[-1]}" if said else "")


def read_end(directory: Path) -> EndRecord | None:
    """How the VMM ended; None while it runs. Blocks: for a file read."""
    return _read(directory / END_RECORD, EndRecord)


def read_exits(directory: Path) -> dict[str, ExitRecord]:
    """The containers of a sandbox that have ended, by id. Blocks: for file reads."""
    records = (_read(path, ExitRecord) for path in sorted((directory / EXITS).glob("*.json")))
    return {record.container_id: record for record in records if record is not None}


def with_outcomes(record: SandboxRecord, directory: Path) -> SandboxRecord:
    """``record`` with what has ended since it was written. Blocks: for file reads."""
    if record.keeper is None:
        return record
    exits = read_exits(directory)
    containers = tuple(_ended(one, exits.get(one.id)) for one in record.containers)
    state = State.STOPPED if read_end(directory) is not None else record.state
    return replace(record, containers=containers, state=state)


def _ended(container: ContainerRecord, end: ExitRecord | None) -> ContainerRecord:
    if end is None:
        return container
    return replace(container, state=State.STOPPED, exit_code=end.status)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        _log.warning("a record can't be read", extra={"target": str(path), "cause": str(error)})
        return None
    return record if record.version == VERSION else None
