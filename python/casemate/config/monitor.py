"""How closely a sandbox is watched."""

from __future__ import annotations

import msgspec

from casemate.config import _checks

__all__ = ["MonitorConfig"]


class MonitorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often VMM and agent are asked, and when a silent agent counts as dead. The VMM's end needs no asking.

    Args:
        interval_s: Seconds between two rounds of asking.
        timeout_s: Seconds that an answer may take; multiplied by ``CASEMATE_TIMEOUT_FACTOR``.
        failures: Rounds in a row that have to fail until the agent is given up.

    Raises:
        InvalidConfigError: A value without meaning; ``path`` names the field.
    """

    interval_s: float = 5.0
    timeout_s: float = 10.0
    failures: int = 3

    def __post_init__(self) -> None:
        _checks.check_seconds("monitor.interval_s", self.interval_s)
        _checks.check_seconds("monitor.timeout_s", self.timeout_s)
        _checks.check_integer("monitor.failures", self.failures, 1, 1000, "rounds")
