"""One answer about the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

__all__ = ["Finding", "State", "read_text"]

State = Literal["yes", "partly", "no"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out about one thing.

    Args:
        name: Of the thing: a word, or two with a dot.
        state: ``yes``: it is there; ``partly``: with a restriction, or something stands in for it; ``no``: it is not.
        text: What was found, or the reason why not.
        cure: What to do about it; empty where nothing is to be done.
        needed: No sandbox can start without it.
        facts: Details, for machines.
    """

    name: str
    state: State
    text: str
    cure: str = ""
    needed: bool = False
    facts: dict[str, Any] = {}


def read_text(path: Path, max_bytes: int = 64 * 1024) -> str:
    """The beginning of a file of ``proc`` or ``sys``; empty when it can't be read. Blocks: for a file read."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes).decode("utf-8", "replace")
    except OSError:
        return ""
