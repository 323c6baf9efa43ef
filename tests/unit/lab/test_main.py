"""The command line of the lab, as far as it goes without one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.lab.__main__ import main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_LAB_CACHE", str(tmp_path / "lab"))
    monkeypatch.setenv("CASEMATE_TEST_CACHE", str(tmp_path / "tests"))


def test_main_when_nothing_is_to_be_run_then_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "./dev lab run uname -a" in capsys.readouterr().err


def test_main_when_shell_has_no_terminal_then_names_what_does_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert main(["shell"]) == 2
    assert "./dev lab run CMD" in capsys.readouterr().err


def test_main_when_command_is_unknown_then_exits_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bild"])
    assert caught.value.code == 2


@pytest.mark.timeout(120)
def test_main_when_tests_cannot_be_collected_then_it_counts_as_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(["test", f"--report={report}", "tests/no-such-file.py"]) == 1
    assert "the tests can't be collected" in capsys.readouterr().err
    assert json.loads(report.read_text())["levels"] == {"lab": {"failed": 1}}
