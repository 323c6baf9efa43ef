"""The table of what ran in the lab. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.placement import OFFERED_BY_LAB

__all__ = ["table"]


def table(tests: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a test: outcome, seconds, what of the lab it needed, its name."""
    rows = [
        (
            str(facts["outcome"]),
            f"{facts['seconds']:.1f}",
            " ".join(name for name in facts["needs"] if name in OFFERED_BY_LAB) or "-",
            nodeid,
        )
        for nodeid, facts in tests.items()
    ]
    head = ("outcome", "seconds", "needed", "test")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(3)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}"
        for row in (head, *rows)
    )
