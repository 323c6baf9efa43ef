"""Numbers for devices: the lowest that is free, so that names stay short and come again."""

from __future__ import annotations

from collections.abc import Container

from casemate.errors import ResourceExhaustedError

__all__ = ["MAX_INDEX", "lowest_free"]

MAX_INDEX = 65534


def lowest_free(taken: Container[str], prefix: str) -> str:
    """``prefix`` with the lowest number, 0 to 65534, whose name is not ``taken``. Raises: ResourceExhaustedError."""
    for number in range(MAX_INDEX + 1):
        if (name := f"{prefix}{number}") not in taken:
            return name
    raise ResourceExhaustedError(f"all {MAX_INDEX + 1} names {prefix}0 to {prefix}{MAX_INDEX} are taken")
