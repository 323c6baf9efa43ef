"""The parity checker finds each kind of fault."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("parity", ROOT / "scripts" / "parity.py")
assert _spec is not None and _spec.loader is not None
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("", "AB-01 has no row"),
        ("| AB-01 | open | - |\n| AB-01 | open | - |", "stands twice"),
        ("| AB-01 | open | - |\n| AB-02 | open | - |", "AB-02 is unknown"),
        ("| AB-01 | maybe | - |", "state 'maybe'"),
        ("| AB-01 | later |  |", "later without a reason"),
        ("| AB-01 | done | - |", "done without a test"),
        ("| AB-01 | done | `tests/absent.py::test_x` |", "no file"),
        ("| AB-01 | done | `tests/unit/test_parity.py::test_absent` |", "no test"),
        ("| AB-01 open |", "not a row"),
    ],
)
def test_check_when_table_is_wrong_then_fault_is_named(table: str, fault: str) -> None:
    assert any(fault in line for line in parity.check(table, {"AB-01"}, ROOT))


def test_check_when_table_is_right_then_nothing_is_said() -> None:
    table = "| AB-01 | open | - |\n| AB-02 | done | `tests/unit/test_parity.py::test_check_when_table_is_right_then_nothing_is_said` |"
    assert parity.check(table, {"AB-01", "AB-02"}, ROOT) == []


def test_parity_table_of_this_tree_then_it_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main() == 0, capsys.readouterr().err
