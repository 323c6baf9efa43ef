"""What an agent's refusal means to the caller. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from casemate.errors import AgentRpcError, CasemateError, CommandError

__all__ = ["command_error"]

_NOT_FOUND = re.compile(r"ENOENT|No such file or directory|executable .*not found", re.IGNORECASE)
_NOT_EXECUTABLE = re.compile(r"EACCES|Permission denied|ENOEXEC|Exec format error|EISDIR", re.IGNORECASE)
_WORKING_DIRECTORY = re.compile(r"\b(cwd|chdir|working directory)\b", re.IGNORECASE)


def command_error(error: AgentRpcError, command: Sequence[str], *, container_id: str) -> CasemateError:
    """CommandError when ``command`` is at fault, else ``error`` itself.

    The agents' texts name the errno of the failed exec; both forms, name and message, are known.
    """
    name = command[0] if command else ""
    if _WORKING_DIRECTORY.search(error.details):
        return error
    if _NOT_FOUND.search(error.details):
        return CommandError(
            f"the command {name!r} does not exist in the image",
            command=name,
            exit_code=127,
            op="container.start",
            container_id=container_id,
        )
    if _NOT_EXECUTABLE.search(error.details):
        return CommandError(
            f"the command {name!r} can't be executed: {error.details}",
            command=name,
            exit_code=126,
            op="container.start",
            container_id=container_id,
        )
    return error
