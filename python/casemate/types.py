"""States, identifiers and small results shared by every part."""

from __future__ import annotations

import enum
import re
from typing import NewType

import msgspec

from casemate.errors import CasemateError, InvalidConfigError, InvalidStateError

__all__ = [
    "Attachment",
    "BlockAttachment",
    "ContainerId",
    "Event",
    "EventKind",
    "ExecId",
    "ExecResult",
    "NicAttachment",
    "Phase",
    "Progress",
    "RunResult",
    "SandboxId",
    "State",
    "check_identifier",
    "check_transition",
    "is_identifier",
]

SandboxId = NewType("SandboxId", str)
ContainerId = NewType("ContainerId", str)
ExecId = NewType("ExecId", str)

_IDENTIFIER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")


class State(enum.StrEnum):
    """State of a sandbox or container."""

    READY = "ready"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


_TRANSITIONS = frozenset(
    {
        (State.READY, State.RUNNING),
        (State.READY, State.STOPPED),
        (State.RUNNING, State.PAUSED),
        (State.RUNNING, State.STOPPED),
        (State.PAUSED, State.RUNNING),
        (State.PAUSED, State.STOPPED),
        (State.STOPPED, State.RUNNING),
    }
)


def check_transition(current: State, wanted: State, *, op: str = "") -> None:
    """Raise InvalidStateError unless ``current`` may become ``wanted``. Does not block."""
    if (current, wanted) not in _TRANSITIONS:
        raise InvalidStateError(
            f"{op or 'the operation'} needs a step from {current.value} to {wanted.value}, which does not exist",
            state=current.value,
            wanted=wanted.value,
            op=op or None,
        )


def is_identifier(name: str) -> bool:
    """Whether ``name`` can name a sandbox, container or process."""
    return _IDENTIFIER.fullmatch(name) is not None


def check_identifier(name: str, path: str) -> str:
    """Return ``name`` when it can name a sandbox, container or process.

    Raises:
        InvalidConfigError: It can't; ``path`` says where it stood.
    """
    if not is_identifier(name):
        raise InvalidConfigError(
            f"{path} is {name!r}; 1 to 64 letters, digits, '_', '.' and '-' are expected, the first a letter or digit",
            path=path,
        )
    return name


class EventKind(enum.StrEnum):
    """What can happen to a running sandbox."""

    UNHEALTHY = "unhealthy"
    """One round of asking VMM and agent failed."""
    AGENT_DEAD = "agent_dead"
    """Too many did: the agent was given up, requests to it fail at once."""
    GUEST_PANICKED = "guest_panicked"
    """The guest's kernel panicked; the text has what it said."""
    VMM_EXITED = "vmm_exited"
    """The VMM's process ended."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a sandbox.

    Args:
        kind: What.
        sandbox_id: To which.
        text: For people.
        error: The cause, where it is one.
    """

    kind: EventKind
    sandbox_id: str
    text: str
    error: CasemateError | None = None


class Phase(msgspec.Struct, frozen=True):
    """One phase of a start: ``name`` and its length in milliseconds."""

    name: str
    duration_ms: float


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a phase of a preparation has come, in bytes; ``total_bytes`` is 0 while unknown."""

    phase: str
    done_bytes: int
    total_bytes: int


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a captured process ended.

    Args:
        exit_code: Its exit status; 128 + n when signal n ended it.
        stdout_bytes: What it wrote.
        stderr_bytes: The same of its standard error; empty with a terminal.
    """

    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes

    @property
    def stdout(self) -> str:
        """What it wrote, as text; bytes that are not UTF-8 are replaced."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """The same of its standard error."""
        return self.stderr_bytes.decode("utf-8", "replace")


class RunResult(ExecResult, frozen=True, kw_only=True):
    """How :func:`casemate.run` ended; ``timings`` splits the start into phases, in order."""

    sandbox_id: str
    guest_kernel: str
    timings: tuple[Phase, ...]


class BlockAttachment(msgspec.Struct, frozen=True, kw_only=True, tag="block", forbid_unknown_fields=True):
    """A disk that was attached to a running sandbox.

    Args:
        id: Its name in the sandbox, for :meth:`casemate.Sandbox.detach`; also its serial number in the guest.
        path: The file or block device on the host.
        readonly: The guest can't write.
        pci_path: The slots on the way to it from the root bus.
        device: Its node in the guest, as ``/dev/vdb``; None: the guest's agent can't tell.
    """

    id: str
    path: str
    readonly: bool
    pci_path: str
    device: str | None = None


class NicAttachment(msgspec.Struct, frozen=True, kw_only=True, tag="nic", forbid_unknown_fields=True):
    """A network interface that was attached to a running sandbox.

    Args:
        id: Its name in the sandbox, for :meth:`casemate.Sandbox.detach`.
        mac: Its hardware address.
        tap: Name of its tap device on the host.
        netns: Path of the network namespace of the tap device; None: the owner's.
        pci_path: The slots on the way to it from the root bus.
        interface: Its name in the guest, as ``eth0``; None: the guest's agent can't tell.
    """

    id: str
    mac: str
    tap: str
    netns: str | None = None
    pci_path: str
    interface: str | None = None


Attachment = BlockAttachment | NicAttachment
