"""Where the time of a start went. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from casemate.types import Phase

__all__ = ["BOOT_MARK", "PhaseClock", "split_boot"]

BOOT_MARK = "casemate.boot_ns."
"""Prefix of the agent's extra features that tell nanoseconds since the guest's boot."""


class PhaseClock:
    """Cuts the time since its making into named phases that follow each other."""

    __slots__ = ("_at_ns", "_phases")

    def __init__(self) -> None:
        self._at_ns = time.perf_counter_ns()
        self._phases: list[Phase] = []

    def mark(self, name: str) -> None:
        """End the phase that began with the last mark and call it ``name``."""
        now_ns = time.perf_counter_ns()
        self._phases.append(Phase(name, (now_ns - self._at_ns) / 1e6))
        self._at_ns = now_ns

    def split_boot(self, extra_features: Sequence[str]) -> None:
        """Put the parts that the agent tells of in the place of the phase ``boot``."""
        for index, phase in enumerate(self._phases):
            if phase.name == "boot":
                self._phases[index : index + 1] = split_boot(phase, extra_features)
                return

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases so far, in order."""
        return tuple(self._phases)


def split_boot(boot: Phase, extra_features: Sequence[str]) -> tuple[Phase, ...]:
    """Split the wait for the agent by the marks it reports.

    Args:
        boot: From the VMM's start to the agent's call.
        extra_features: ``casemate.boot_ns.<mark>=<nanoseconds since the guest's boot>``; marks used: ``init`` (the agent's
            first instruction) and ``connected`` (its call to the host).

    Returns: ``firmware``, ``kernel``, ``agent``; or ``boot`` alone when there are no such marks. The guest's clock begins in the
        early kernel, so the firmware's part is what is left of the host's measure.
    """
    marks: dict[str, int] = {}
    for feature in extra_features:
        name, separator, value = feature.removeprefix(BOOT_MARK).partition("=")
        if feature.startswith(BOOT_MARK) and separator and value.isascii() and value.isdigit():
            marks[name] = int(value)
    if "init" not in marks or "connected" not in marks:
        return (boot,)
    kernel_ms = marks["init"] / 1e6
    agent_ms = (marks["connected"] - marks["init"]) / 1e6
    firmware_ms = boot.duration_ms - kernel_ms - agent_ms
    if min(kernel_ms, agent_ms) < 0 or firmware_ms < 0:
        return (boot,)
    return (Phase("firmware", firmware_ms), Phase("kernel", kernel_ms), Phase("agent", agent_ms))
