"""The command line: parsing, exit statuses, wrong use. No virtual machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from casemate.cli import COMMANDS, main
from casemate.cli.kill import signal_number
from casemate.cli.logs import since_seconds
from casemate.cli.options import environment, memory_mib
from casemate.cli.run import command_words
from casemate.errors import InvalidConfigError


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_STATE_ROOT", str(tmp_path / "state"))
    monkeypatch.setenv("CASEMATE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "mib"), [("512", 512), ("512M", 512), ("512mib", 512), ("2G", 2048), ("1GiB", 1024)]
)
def test_memory_mib_when_good_then_in_mib(text: str, mib: int) -> None:
    assert memory_mib(text) == mib


@pytest.mark.parametrize("text", ["", "G", "1.5G", "1T", "-1", "5Mx"])
def test_memory_mib_when_bad_then_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        memory_mib(text)


def test_environment_when_only_a_name_then_value_is_this_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "here")
    monkeypatch.delenv("ABSENT", raising=False)
    assert environment(["A=b=c", "GIVEN", "ABSENT", "E="]) == {"A": "b=c", "GIVEN": "here", "E": ""}
    with pytest.raises(InvalidConfigError):
        environment(["=x"])


@pytest.mark.parametrize(("text", "number"), [("9", 9), ("KILL", 9), ("sigterm", 15), ("SIGUSR1", 10)])
def test_signal_number_then_names_and_numbers(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["NOPE", "0", "999", ""])
def test_signal_number_when_bad_then_refused(text: str) -> None:
    with pytest.raises(InvalidConfigError):
        signal_number(text)


def test_command_words_then_only_the_first_dashes_fall_away() -> None:
    assert command_words(["--", "sh", "--", "x"]) == ("sh", "--", "x")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_main_when_help_is_asked_then_it_is_printed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"casemate {command}" in capsys.readouterr().out


def test_main_when_nothing_is_said_then_help_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_main_when_ps_and_there_is_none_then_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["rm", "nobody"], 1, "no sandbox is named 'nobody'"),
        (["exec", "nobody", "true"], 125, "no sandbox is named 'nobody'"),
        (["exec", "nobody"], 125, "needs a command"),
        (["kill", "-s", "NOPE", "nobody"], 1, "is no signal"),
        (["run", "oci:/nonexistent", "true"], 125, "/nonexistent"),
        (["run", "--vcpus", "0", "oci:/nonexistent", "true"], 125, "vcpus"),
        (["run", "--vcpus", "10000", "oci:/nonexistent", "true"], 125, "vcpus"),
        (["bench", "startup", "-n", "0"], 1, "1 to 10000"),
        (["bench", "startup", "--plot", "x.gif"], 1, ".svg"),
    ],
)
def test_main_when_use_is_wrong_then_status_and_reason(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(words) == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "state" / "sandboxes").exists() or not list(
        (tmp_path / "state" / "sandboxes").iterdir()
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 990.0), ("1.5m", 910.0), ("0.1h", 640.0), ("0d", 1000.0), ("1970-01-01T00:00:07Z", 7.0)],
)
def test_since_seconds_when_ago_or_a_time_then_seconds(text: str, seconds: float) -> None:
    assert since_seconds(text, 1000.0) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "5w", "yesterday", "2026-11-25"])
def test_since_seconds_when_neither_then_both_forms_are_named(text: str) -> None:
    with pytest.raises(InvalidConfigError, match=r"5m.*2026-11-25T00:33:27Z"):
        since_seconds(text, 0.0)


@pytest.mark.parametrize("command", ["start", "stop", "attach", "logs"])
def test_main_when_the_sandbox_is_unknown_then_the_names_there_are_are_told(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "nowhere"]) == (125 if command == "attach" else 1)
    assert "no sandbox is named 'nowhere'; there is none" in capsys.readouterr().err


def test_main_when_run_is_detached_and_interactive_then_the_way_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "-di", "oci:/nowhere"]) == 125
    assert "casemate attach -i" in capsys.readouterr().err
