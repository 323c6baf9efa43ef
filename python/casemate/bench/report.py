"""The one document that every benchmark prints, and its table. Pure.

``{"bench", "boundary", "host", "versions", "figures": [{"name", "unit", "better", "n", "failures", "ours": {"p50","p90","p99","cpu"},
"peers": {NAME: {"p50","p90","p99","cpu"}}, "ratio": {NAME: ours/peer of the medians}}]}``. A peer that is not installed stands in
``absent`` with the reason.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from casemate import _core

if TYPE_CHECKING:
    from casemate.persist.record import SandboxRecord

__all__ = [
    "Figure",
    "Report",
    "Summary",
    "guest_versions",
    "host_facts",
    "own_versions",
    "percentile",
    "ratios",
    "summarize",
    "table",
]

PEERS = ("floor", "raw", "go", "rust", "pyroute2", "iproute2", "plain", "runc", "kata", "python")
"""The names that peers may have."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Distribution of one side: percentiles in the figure's unit, ``cpu`` the median processor time in it too."""

    p50: float
    p90: float
    p99: float
    cpu: float | None = None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured quantity, ours and the peers'."""

    name: str
    unit: str
    better: str
    n: int
    failures: int
    ours: Summary
    peers: dict[str, Summary] = {}
    ratio: dict[str, float] = {}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A benchmark's document. ``boundary`` says what is timed; ``absent`` names peers that could not run, with the reason."""

    bench: str
    boundary: str
    host: dict[str, str]
    versions: dict[str, str]
    figures: tuple[Figure, ...]
    absent: dict[str, str] = {}


def percentile(values: Sequence[float], share: float) -> float:
    """The value at ``share`` (0 to 1) of the sorted values, between two neighbours by proportion.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(values: Sequence[float], cpu: Sequence[float] = ()) -> Summary:
    """The distribution of ``values``, with the median of ``cpu``."""
    return Summary(
        p50=percentile(values, 0.5),
        p90=percentile(values, 0.9),
        p99=percentile(values, 0.99),
        cpu=percentile(cpu, 0.5) if cpu else None,
    )


def ratios(ours: Summary, peers: dict[str, Summary]) -> dict[str, float]:
    """Ours over each peer's median."""
    return {name: ours.p50 / peer.p50 for name, peer in peers.items() if peer.p50}


def table(report: Report) -> list[tuple[str, ...]]:
    """Rows for a terminal, the head first."""
    rows: list[tuple[str, ...]] = [("figure", "unit", "side", "p50", "p90", "p99", "cpu", "ours/peer")]
    for figure in report.figures:
        rows.append((figure.name, figure.unit, "ours", *_cells(figure.ours), ""))
        for name, peer in figure.peers.items():
            rows.append(
                ("", "", name, *_cells(peer), f"{figure.ratio[name]:.3f}" if name in figure.ratio else "")
            )
    for name, reason in report.absent.items():
        rows.append(("", "", name, "absent", reason, "", "", ""))
    return rows


def _cells(side: Summary) -> tuple[str, ...]:
    return tuple(
        "-" if value is None else f"{value:.1f}" for value in (side.p50, side.p90, side.p99, side.cpu)
    )


def host_facts() -> dict[str, str]:
    """What of this host belongs beside every figure. Does not block."""
    return {"machine": platform.machine(), "kernel": platform.release(), "cpus": str(os.cpu_count())}


def own_versions() -> dict[str, str]:
    """Versions of this package and its interpreter. Does not block."""
    return {"casemate": _core.__version__, "python": platform.python_version()}


def guest_versions(record: SandboxRecord, vmm_version: str) -> dict[str, str]:
    """Versions of all that a sandbox with ``record`` runs on. Does not block."""
    return {
        **own_versions(),
        "vmm": f"{record.hypervisor} {vmm_version}",
        "machine": record.machine,
        "accel": record.accel,
        "guest kernel": record.kernel_release,
    }
