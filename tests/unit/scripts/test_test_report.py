"""Counts are gathered and judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import test_report as report


def write(directory: Path, name: str, levels: dict[str, dict[str, int]], skips: dict[str, int]) -> None:
    (directory / f"{name}.json").write_text(json.dumps({"levels": levels, "skips": skips}), "utf-8")


def test_count_cargo_when_line_is_a_result_then_its_numbers_are_taken() -> None:
    line = "test result: ok. 12 passed; 1 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.01s\n"
    assert report.count_cargo(line) == {"passed": 12, "failed": 1, "skipped": 3}


def test_count_cargo_when_line_is_something_else_then_nothing_is_counted() -> None:
    assert report.count_cargo("running 12 tests\n") == {"passed": 0, "failed": 0, "skipped": 0}


def test_total_when_all_passed_then_last_line_has_the_sum(tmp_path: Path) -> None:
    write(tmp_path, "rust", {"rust": {"passed": 2}}, {})
    write(tmp_path, "unit", {"unit": {"passed": 3, "skipped": 1}}, {"needs /dev/vhost-vsock": 1})
    lines, good = report.total(tmp_path, 1)
    assert good
    assert lines[-1] == "5 passed, 0 failed, 1 skipped"
    assert "  skipped 1 × needs /dev/vhost-vsock" in lines


@pytest.mark.parametrize(
    "counts",
    [{"passed": 1, "failed": 1}, {}, {"passed": 1, "skipped": 2}],
    ids=["failed", "none ran", "skips"],
)
def test_total_when_run_is_not_good_then_it_says_so(tmp_path: Path, counts: dict[str, int]) -> None:
    write(tmp_path, "unit", {"unit": counts}, {})
    assert not report.total(tmp_path, 1)[1]


def test_run_when_command_fails_then_counts_and_status_are_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "rust.json"
    status = report.run(
        file, ["sh", "-c", "echo 'test result: FAILED. 1 passed; 2 failed; 0 ignored; 0'; exit 101"]
    )
    assert status == 1
    assert json.loads(file.read_text("utf-8"))["levels"] == {"rust": {"passed": 1, "failed": 2, "skipped": 0}}
    assert "FAILED" in capfd.readouterr().out


def write_lab(directory: Path, name: str, where: str, outcomes: dict[str, str]) -> None:
    levels = {"e2e": {kind: list(outcomes.values()).count(kind) for kind in set(outcomes.values())}}
    tests = {test: {"outcome": outcome, "seconds": 1, "needs": []} for test, outcome in outcomes.items()}
    document = {"where": where, "host": "x", "levels": levels, "skips": {}, "tests": tests}
    (directory / f"{name}.json").write_text(json.dumps(document), "utf-8")


def test_total_when_lab_ran_a_part_then_says_how_many_ran_where_and_what_is_left(tmp_path: Path) -> None:
    write_lab(tmp_path, "host", "host", {"a": "deferred", "b": "deferred", "c": "passed"})
    write_lab(tmp_path, "lab", "lab", {"a": "passed"})
    lines, good = report.total(tmp_path, 0)
    assert good
    assert lines[-3:] == [
        "  ran on this host: 1 passed, 0 failed, 0 skipped",
        "  ran in the lab: 1 passed, 0 failed, 0 skipped",
        "2 passed, 0 failed, 0 skipped",
    ]
    assert "  left to ./dev test --all: 1 of the lab's tests" in lines


def test_total_when_lab_was_not_started_then_its_tests_are_skipped_ones(tmp_path: Path) -> None:
    write_lab(tmp_path, "host", "host", {"a": "deferred", "b": "deferred", "c": "passed"})
    lines, good = report.total(tmp_path, 1)
    assert not good
    assert lines[-1] == "1 passed, 0 failed, 2 skipped"
    assert "  skipped 2 × the lab was not started" in lines


def test_total_when_lab_did_not_come_up_then_the_run_is_not_good(tmp_path: Path) -> None:
    write_lab(tmp_path, "host", "host", {"c": "passed"})
    document = {"where": "lab", "levels": {"lab": {"failed": 1}}, "skips": {}, "tests": {}}
    (tmp_path / "lab.json").write_text(json.dumps(document), "utf-8")
    assert not report.total(tmp_path, 1)[1]


def test_total_when_nobody_asked_for_the_lab_then_its_tests_are_left_and_not_skipped(tmp_path: Path) -> None:
    write_lab(
        tmp_path, "host", "host", {"tests/lab/test_kvm.py::test_a": "deferred", "tests/e2e/test_b": "passed"}
    )
    lines, good = report.total(tmp_path, 0, lab=False)
    assert good
    assert "  left to ./dev test --all: 1 of the lab's tests" in lines
    assert not report.total(tmp_path, 0)[1]
