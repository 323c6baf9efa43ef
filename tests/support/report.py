"""Pytest plugin: counts by level and reasons of skips, written for ``scripts/test_report.py``."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import capabilities
from tests.support.placement import DEFERRED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, default=None, help="file for the counts of this run, JSON")


def pytest_configure(config: pytest.Config) -> None:
    file: Path | None = config.getoption("--report")
    if file is not None:
        # The writer is there later than this is called.
        tell = (lambda text: config.get_terminal_writer().line(text)) if capabilities.IN_LAB else None
        config.pluginmanager.register(Report(file, tell), "casemate-report")


def pytest_report_header() -> str:
    return "host: " + capabilities.summary()


def level_of(nodeid: str) -> str:
    """``unit`` for ``tests/unit/…``; ``other`` for what lies elsewhere."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else "other"


class Report:
    """Counts each test once, by its worst phase. ``tell`` gets a failure when it happens: a lab may not live to the end."""

    def __init__(self, file: Path, tell: Callable[[str], None] | None = None) -> None:
        self._file = file
        self._tell = tell
        self._outcome: dict[str, str] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._needs: dict[str, list[str]] = {}
        self._skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        needs = next((value for name, value in report.user_properties if name == "needs"), ())
        assert isinstance(needs, tuple | list)
        self._needs[report.nodeid] = [str(name) for name in needs]
        if report.failed:
            self._outcome[report.nodeid] = "failed"
            if self._tell is not None:
                self._tell(f"\n{report.longreprtext}")
        elif report.skipped and not hasattr(report, "wasxfail"):
            longrepr = report.longrepr
            reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
            reason = reason.removeprefix("Skipped: ")
            if reason.startswith(DEFERRED):
                self._outcome[report.nodeid] = "deferred"
            else:
                self._outcome[report.nodeid] = "skipped"
                self._skips[reason] += 1
        else:
            self._outcome.setdefault(report.nodeid, "passed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._outcome[report.nodeid] = "failed"

    def pytest_sessionfinish(self) -> None:
        levels: dict[str, Counter[str]] = {}
        for nodeid, outcome in self._outcome.items():
            levels.setdefault(level_of(nodeid), Counter())[outcome] += 1
        self._file.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "where": "lab" if capabilities.IN_LAB else "host",
            "host": capabilities.summary(),
            "levels": levels,
            "skips": self._skips,
            "tests": {
                nodeid: {
                    "outcome": outcome,
                    "seconds": round(self._seconds[nodeid], 2),
                    "needs": self._needs.get(nodeid, []),
                }
                for nodeid, outcome in self._outcome.items()
                if outcome == "deferred" or capabilities.IN_LAB
            },
        }
        self._file.write_text(json.dumps(document), "utf-8")
