"""Pytest plugin: counts by level and reasons of skips, written for ``scripts/test_report.py``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.support import capabilities


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, default=None, help="file for the counts of this run, JSON")


def pytest_configure(config: pytest.Config) -> None:
    file: Path | None = config.getoption("--report")
    if file is not None:
        config.pluginmanager.register(Report(file), "casemate-report")


def pytest_report_header() -> str:
    return "host: " + capabilities.summary()


def level_of(nodeid: str) -> str:
    """``unit`` for ``tests/unit/…``; ``other`` for what lies elsewhere."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else "other"


class Report:
    """Counts each test once, by its worst phase."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._outcome: dict[str, str] = {}
        self._skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._outcome[report.nodeid] = "failed"
        elif report.skipped and not hasattr(report, "wasxfail"):
            self._outcome[report.nodeid] = "skipped"
            longrepr = report.longrepr
            reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
            self._skips[reason.removeprefix("Skipped: ")] += 1
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
        document = {"host": capabilities.summary(), "levels": levels, "skips": self._skips}
        self._file.write_text(json.dumps(document), "utf-8")
