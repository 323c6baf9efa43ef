from __future__ import annotations

import time

import pytest

from casemate.errors import DeadlineExceededError, UnsupportedError
from casemate.guest.command import run_command


def test_run_command_returns_status_output_and_errors() -> None:
    result = run_command(["sh", "-c", "echo out; echo oops >&2; exit 3"], deadline_s=10)

    assert (result.status, result.output, result.error_text) == (3, "out\n", "oops")


def test_run_command_that_says_nothing_tells_its_status() -> None:
    assert run_command(["sh", "-c", "exit 4"], deadline_s=10).error_text == "exit status 4"


def test_run_command_past_its_deadline_is_killed() -> None:
    started = time.monotonic()

    with pytest.raises(DeadlineExceededError, match=r"did not end within 0\.2 s"):
        run_command(["sleep", "60"], deadline_s=0.2)
    assert time.monotonic() - started < 10


def test_run_command_that_closes_its_output_and_stays_is_killed_too() -> None:
    with pytest.raises(DeadlineExceededError):
        run_command(["sh", "-c", "exec >&- 2>&-; exec sleep 60"], deadline_s=0.3)


def test_run_command_that_is_missing_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="no-such-tool is not installed") as caught:
        run_command(["no-such-tool"], deadline_s=1)
    assert caught.value.capability == "no-such-tool"


def test_run_command_hands_on_lines_of_the_status_pipe() -> None:
    lines: list[str] = []

    script = r"printf 'a\nb\npart' >/dev/fd/$0"
    run_command(["sh", "-c", script, "{status_fd}"], deadline_s=10, on_status_line=lines.append)

    assert lines == ["a", "b"]
