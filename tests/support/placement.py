"""Where a test runs: here, in the lab, or nowhere. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

__all__ = ["DEFERRED", "OFFERED_BY_LAB", "Placement", "place"]

OFFERED_BY_LAB = frozenset({"kvm", "vhost_vsock", "cgroup2", "ipvlan"})
"""Capabilities that the lab has. A test that needs one of them gets the mark ``lab``."""

DEFERRED = "left to the lab: "
"""How the reason of a skip begins when the test runs elsewhere, which makes it none."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """``where`` the test runs, and the ``reason`` why not here."""

    where: Literal["here", "lab", "nowhere"]
    reason: str = ""


def place(needs: Iterable[str], missing: Callable[[str], str | None], *, in_lab: bool) -> Placement:
    """Where a test runs that ``needs`` capabilities.

    Args:
        missing: Says what this machine lacks for a capability, None when nothing.
        in_lab: This machine is the lab.
    """
    lacks = {name: lack for name in needs if (lack := missing(name)) is not None}
    if not lacks:
        return Placement(where="here")
    text = "needs " + ", ".join(lacks.values())
    # What the lab has not either is no reason to start it.
    if not in_lab and lacks.keys() <= OFFERED_BY_LAB:
        return Placement(where="lab", reason=DEFERRED + text)
    return Placement(where="nowhere", reason=text)
