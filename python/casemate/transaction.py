"""A change to a running sandbox as data: its steps, how each is undone, and how long each may take.

Pure. ``casemate._async.transaction`` carries a plan out; what a step's action means is known to its performers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

__all__ = [
    "Action",
    "AwaitedEvent",
    "GuestCall",
    "NativeCall",
    "Plan",
    "PlanState",
    "QmpCall",
    "Refusal",
    "Step",
]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal of QEMU that is no failure: of that class (empty: any), with that in its text."""

    error_class: str = ""
    text: str = ""

    def covers(self, error_class: str, text: str) -> bool:
        """Whether it is this one."""
        return self.error_class in ("", error_class) and self.text in text


class AwaitedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What ends a command that QEMU answers before it is done.

    Args:
        name: The event that says so.
        refused: The event that says that it will not be done.
        match: What both have in their data.
    """

    name: str
    refused: str
    match: Mapping[str, Any]


class QmpCall(msgspec.Struct, frozen=True, kw_only=True):
    """A command of QEMU.

    Args:
        fd_of: The step whose result is the descriptor that goes with it.
        awaits: The event that ends it.
        done_already: The refusal that says that there is nothing to do.
        under_way: The refusal that says that it was begun before; its event is awaited.
    """

    command: str
    arguments: Mapping[str, Any] = {}
    fd_of: str = ""
    awaits: AwaitedEvent | None = None
    done_already: Refusal | None = None
    under_way: Refusal | None = None

    def describe(self) -> str:
        """In one line."""
        until = f", then {self.awaits.name}" if self.awaits else ""
        return f"{self.command} {_named(self.arguments)}{until}"


class NativeCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function of this process by its registered name; ``result_of`` names the step whose result it is given."""

    function: str
    arguments: Mapping[str, Any] = {}
    result_of: str = ""

    def describe(self) -> str:
        """In one line."""
        return f"{self.function} {_named(self.arguments) or self.result_of}"


class GuestCall(msgspec.Struct, frozen=True, kw_only=True):
    """A question to the agent that changes nothing."""

    method: str
    arguments: Mapping[str, Any] = {}

    def describe(self) -> str:
        """In one line."""
        return f"ask the guest: {self.method} {_named(self.arguments)}"


Action = QmpCall | NativeCall | GuestCall


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a plan.

    Args:
        name: Unique in the plan, and the name of its failpoints: ``name`` before it, ``name.after`` behind it.
        action: What is done.
        limit_s: How long it may take, in seconds.
        undo: What is done when a later step fails, in this order. Each part tolerates that there is nothing to undo.
        undo_limit_s: How long each part of the undo may take; 0: as long as the step.
        check: It changes nothing and says whether the plan's aim was reached.
        final: Once it is done nothing is undone any more; the last step, where undoing would be making anew.
    """

    name: str
    action: Action
    limit_s: float
    undo: tuple[Action, ...] = ()
    undo_limit_s: float = 0.0
    check: bool = False
    final: bool = False

    def describe(self) -> str:
        """In one line."""
        undo = "; ".join(action.describe() for action in self.undo)
        kind = " [check]" if self.check else ""
        return f"{self.name}{kind}: {self.action.describe()}, within {self.limit_s:g} s" + (
            f"; undone by {undo}, within {self.undo_limit_s or self.limit_s:g} s" if undo else ""
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A change as a whole: done, checked, or undone. ``name`` says what and to what."""

    name: str
    steps: tuple[Step, ...]

    def describe(self) -> str:
        """Its steps, one a line, for people."""
        lines = [f"  {number}. {step.describe()}" for number, step in enumerate(self.steps, 1)]
        return "\n".join([self.name, *lines])


class PlanState(StrEnum):
    """How far a plan came.

    ``applied``: all was done, not all was checked. ``verified``: and the guest has said so. ``broken``: it failed and something
    could not be undone.
    """

    PLANNED = "planned"
    APPLIED = "applied"
    VERIFIED = "verified"
    ROLLED_BACK = "rolled back"
    BROKEN = "broken"


def _named(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in arguments.items())
