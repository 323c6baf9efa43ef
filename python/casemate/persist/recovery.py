"""Sandboxes as they lie on disk: told of, and removed when their owner is dead. Nothing here needs a living part of them."""

from __future__ import annotations

import os

import msgspec

from casemate.config.settings import Settings
from casemate.errors import (
    DeadlineExceededError,
    HostError,
    InvalidConfigError,
    InvalidStateError,
    NotFoundError,
)
from casemate.persist.record import SandboxRecord
from casemate.persist.store import (
    SandboxDirectory,
    end_left_processes,
    is_alive,
    is_owned,
    load_record,
    remove_empty,
    sandboxes_root,
)
from casemate.types import SandboxId, check_identifier, is_identifier

__all__ = ["CleanupReport", "SandboxInfo", "cleanup", "list_names", "list_sandboxes"]


class SandboxInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox as it lies on disk.

    Args:
        id: Its name.
        alive: Whether its owner lives. What a dead owner left is removed by ``Sandbox.cleanup``.
        owner_pid: The process that made it; None when the document does not say.
        record: Its state document; None when there is none or it can't be read.
        problem: Why ``record`` is None, else None.
    """

    id: str
    alive: bool
    owner_pid: int | None = None
    record: SandboxRecord | None = None
    problem: str | None = None


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a cleanup did.

    Args:
        sandbox_id: The sandbox.
        removed: Whether there was something; False the second time.
        ended_pids: Processes that were left and are ended now.
        unverified: What the state document would have told and could not, one sentence each. Empty: all was known.
    """

    sandbox_id: str
    removed: bool
    ended_pids: tuple[int, ...] = ()
    unverified: tuple[str, ...] = ()


def list_names(settings: Settings) -> tuple[str, ...]:
    """Names of all sandboxes on disk, sorted. Blocks: for reads of a directory. Raises: HostError."""
    root = sandboxes_root(settings)
    try:
        with os.scandir(root) as entries:
            # What can't be a sandbox's name was not put there by us.
            return tuple(
                sorted(
                    entry.name
                    for entry in entries
                    if is_identifier(entry.name) and entry.is_dir(follow_symlinks=False)
                )
            )
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise _host_error(error, str(root), "sandbox.list", None) from error


def list_sandboxes(settings: Settings) -> tuple[SandboxInfo, ...]:
    """All sandboxes on disk, also those whose document can't be read. Blocks: for file reads. Raises: HostError."""
    found = []
    for name in list_names(settings):
        try:
            info = _describe(settings, name)
        except OSError as error:
            raise _host_error(error, str(sandboxes_root(settings) / name), "sandbox.list", name) from error
        if info is not None:
            found.append(info)
    return tuple(found)


def _describe(settings: Settings, name: str) -> SandboxInfo | None:
    from casemate.persist.outcome import with_outcomes  # here: 3 ms that a start does not need

    record, problem = None, None
    try:
        record = with_outcomes(load_record(settings, name), sandboxes_root(settings) / name)
    except InvalidConfigError as error:
        problem = str(error)
    except NotFoundError:
        problem = "there is no state document: its owner ended before it wrote one, or is about to"
    alive = is_owned(settings, name)
    if not alive and not (sandboxes_root(settings) / name).is_dir():
        return None  # removed in the meantime
    owner_pid = None if record is None else record.owner.pid
    return SandboxInfo(id=name, alive=alive, owner_pid=owner_pid, record=record, problem=problem)


def cleanup(settings: Settings, sandbox_id: str) -> CleanupReport:
    """Remove everything that a dead owner left of a sandbox. Idempotent; of several at once one does it.

    A VMM is found by its record, and by the sockets of the directory that it holds, so also one that was not recorded yet or
    whose record can't be read.

    Raises:
        InvalidConfigError: That is no name of a sandbox.
        InvalidStateError: The owner lives, or somebody else removes it just now; nothing was touched.
        DeadlineExceededError: A process did not end in 5 s of SIGKILL; the directory stays.
        HostError: A file can't be removed or a process not be ended; what could not be removed stays.
    Blocks: for the end of a left VMM, and file system calls.
    """
    check_identifier(sandbox_id, "sandbox")
    path = sandboxes_root(settings) / sandbox_id
    if path.is_symlink():
        raise InvalidConfigError(
            f"{path} is a symbolic link, a directory is expected; remove the link by hand", path="sandbox"
        )
    try:
        if remove_empty(path):
            return CleanupReport(sandbox_id=sandbox_id, removed=True)
        directory = SandboxDirectory.take_left(settings, SandboxId(sandbox_id))
        if directory is None:
            return CleanupReport(sandbox_id=sandbox_id, removed=False)
        try:
            record, unverified = _what_is_known(settings, sandbox_id)
            recorded = () if record is None else (record.keeper, record.vmm)
            ended = end_left_processes(path, *recorded)
            directory.remove()
        finally:
            directory.release()
    except BlockingIOError as error:
        raise InvalidStateError(
            f"sandbox {sandbox_id!r} {_holder_text(settings, sandbox_id)}",
            state="owned",
            wanted="dead",
            op="sandbox.cleanup",
            sandbox_id=sandbox_id,
        ) from error
    except (HostError, DeadlineExceededError):
        raise
    except OSError as error:
        raise _host_error(error, str(error.filename or path), "sandbox.cleanup", sandbox_id) from error
    return CleanupReport(sandbox_id=sandbox_id, removed=True, ended_pids=ended, unverified=unverified)


def _what_is_known(settings: Settings, sandbox_id: str) -> tuple[SandboxRecord | None, tuple[str, ...]]:
    try:
        return load_record(settings, sandbox_id), ()
    except NotFoundError:
        # It is written before anything else is made: without it there is nothing but the directory.
        return None, ()
    except InvalidConfigError as error:
        return None, (f"what the document recorded outside the directory is unknown: {error}",)


def _holder_text(settings: Settings, sandbox_id: str) -> str:
    try:
        record = load_record(settings, sandbox_id)
    except (NotFoundError, InvalidConfigError):
        return "is held by a living process, which is making it or removing it"
    owner = record.owner
    if record.keeper == owner and is_alive(owner):
        return f"is detached and lives, kept by process {owner.pid}; end it with `casemate stop`"
    if is_alive(owner):
        return f"belongs to the living process {owner.pid}; end that, or use `casemate rm --force`"
    return f"is held by a fork of its dead owner {owner.pid}, or being removed at this moment"


def _host_error(error: OSError, target: str, op: str, sandbox_id: str | None) -> HostError:
    return HostError(
        f"{op} failed at {target}: {error.strerror or error}",
        errno=error.errno or 0,
        target=target,
        op=op,
        sandbox_id=sandbox_id,
    )
