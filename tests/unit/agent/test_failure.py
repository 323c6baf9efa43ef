"""What an agent's refusal means."""

from __future__ import annotations

import pytest

from casemate.agent.failure import command_error
from casemate.errors import AgentRpcError, CommandError


@pytest.mark.parametrize(
    ("details", "exit_code"),
    [
        ("exec /nope: ENOENT: No such file or directory", 127),
        ("executable 'nope' for container not found in $PATH", 127),
        ("exec /etc/passwd: EACCES: Permission denied", 126),
        ("exec /x: ENOEXEC: Exec format error", 126),
    ],
)
def test_command_error_when_exec_failed_then_exit_code_is_that_of_a_shell(
    details: str, exit_code: int
) -> None:
    error = command_error(AgentRpcError("x", details=details), ("nope",), container_id="c")
    assert isinstance(error, CommandError)
    assert (error.exit_code, error.command, error.container_id) == (exit_code, "nope", "c")


@pytest.mark.parametrize(
    "details", ["mount failed: EINVAL", "chdir /none: ENOENT: No such file or directory"]
)
def test_command_error_when_something_else_failed_then_unchanged(details: str) -> None:
    error = AgentRpcError("x", details=details)
    assert command_error(error, ("sh",), container_id="c") is error
