"""Phases of a start."""

from __future__ import annotations

import pytest

from casemate.observe.timings import PhaseClock, split_boot
from casemate.types import Phase

BOOT = Phase("boot", 1000.0)


def test_split_boot_when_agent_tells_its_marks_then_parts_sum_to_the_whole() -> None:
    features = ["other", "casemate.boot_ns.init=700000000", "casemate.boot_ns.connected=750000000"]
    parts = split_boot(BOOT, features)
    assert [part.name for part in parts] == ["firmware", "kernel", "agent"]
    assert sum(part.duration_ms for part in parts) == pytest.approx(BOOT.duration_ms)
    assert parts[1].duration_ms == pytest.approx(700.0)


@pytest.mark.parametrize(
    "features",
    [
        [],
        ["casemate.boot_ns.init=5"],
        ["casemate.boot_ns.init=x", "casemate.boot_ns.connected=7"],
        ["casemate.boot_ns.init=9", "casemate.boot_ns.connected=7"],
        ["casemate.boot_ns.init=1", "casemate.boot_ns.connected=99999999999999"],
    ],
)
def test_split_boot_when_marks_make_no_sense_then_whole(features: list[str]) -> None:
    assert split_boot(BOOT, features) == (BOOT,)


def test_phase_clock_when_marked_then_phases_follow_in_order() -> None:
    clock = PhaseClock()
    clock.mark("plan")
    clock.mark("boot")
    clock.mark("sandbox")
    clock.split_boot([])
    assert [phase.name for phase in clock.phases] == ["plan", "boot", "sandbox"]
    assert all(phase.duration_ms >= 0 for phase in clock.phases)
