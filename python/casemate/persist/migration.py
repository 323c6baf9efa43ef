"""State documents of older versions, made into today's one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from casemate.errors import InvalidConfigError

__all__ = ["STEPS", "Step", "migrate"]

Step = Callable[[dict[str, Any]], dict[str, Any]]


def _with_devices(document: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew no later devices. Its owner kept them to itself, so nothing is known of their places."""
    return {**document, "topology": {"bridges": []}, "devices": []}


def _with_keeper(document: dict[str, Any]) -> dict[str, Any]:
    """Version 2 knew no keepers: every sandbox was its maker's."""
    return {**document, "keeper": None}


STEPS: Mapping[int, Step] = {1: _with_devices, 2: _with_keeper}
"""``STEPS[n]`` makes a decoded document of version n into one of version n + 1. There is no older form than version 1."""


def migrate(document: object, *, version: int, steps: Mapping[int, Step], name: str) -> dict[str, Any]:
    """``document`` as one of ``version``; the steps leave the number to this function. Does not block.

    Raises:
        InvalidConfigError: It has no version, is newer than ``version``, or too old for ``steps``; ``name`` says whose it is.
    """
    found = document.get("version") if isinstance(document, dict) else None
    if not isinstance(document, dict) or type(found) is not int:
        raise InvalidConfigError(f"{name} is not a state document: it has no version", path="version")
    if found > version:
        raise InvalidConfigError(
            f"{name} is of version {found}, this casemate reads version {version} and older; use the newer one",
            path="version",
        )
    current: dict[str, Any] = dict(document)
    for number in range(found, version):
        step = steps.get(number)
        if step is None:
            raise InvalidConfigError(
                f"{name} is of version {found}, which this casemate can't read any more", path="version"
            )
        current = {**step(current), "version": number + 1}
    return current
