"""How one argument of QEMU's command line is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from casemate.errors import InvalidConfigError

__all__ = ["Value", "escape", "render", "to_text"]

Value = str | int | bool
"""A property's value as QMP takes it too."""


def escape(value: str) -> str:
    """``value`` with its commas doubled, as QEMU's option parser wants a comma that is not a separator.

    Raises:
        InvalidConfigError: It holds a NUL, which no argument can.
    """
    if "\0" in value:
        raise InvalidConfigError(f"{value!r} holds a NUL character, which no argument can")
    return value.replace(",", ",,")


def to_text(value: Value) -> str:
    """A value in QEMU's words: ``on`` and ``off`` for a truth."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return escape(str(value))


def render(head: str | None, properties: Mapping[str, Value] | Iterable[tuple[str, Value]]) -> str:
    """``head,key=value,…``; without ``head`` only the pairs. Keys are ours and not escaped."""
    pairs = properties.items() if isinstance(properties, Mapping) else properties
    parts = [f"{key}={to_text(value)}" for key, value in pairs]
    return ",".join(parts if head is None else [escape(head), *parts])
