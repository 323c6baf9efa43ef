"""Run a short tool of the host to its end, with a deadline and its output bounded."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from casemate.errors import DeadlineExceededError, HostError, UnsupportedError

__all__ = ["CommandResult", "run_command"]

_MAX_OUTPUT_BYTES = 64 << 20
_TAIL_LINES = 6


class CommandResult(msgspec.Struct, frozen=True):
    """Exit status, standard output and standard error of a tool."""

    status: int
    output: str
    errors: str

    @property
    def error_text(self) -> str:
        """Its last lines of complaint on one line, or its status when it said nothing."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return "; ".join(lines[-_TAIL_LINES:]) or f"exit status {self.status}"


def run_command(
    argv: Sequence[str],
    *,
    deadline_s: float,
    directory: Path | None = None,
    on_status_line: Callable[[str], None] | None = None,
) -> CommandResult:
    """Run ``argv`` with the C locale and nothing on its standard input.

    Args:
        deadline_s: Seconds after which it is killed.
        directory: Where it runs.
        on_status_line: Gets each line that it writes to a pipe of its own; ``{status_fd}`` in ``argv`` becomes the number of that.

    Raises:
        UnsupportedError: The tool is not installed.
        DeadlineExceededError: It was killed at the deadline.
    Blocks: until it ends.
    """
    status_read, status_write = os.pipe() if on_status_line else (-1, -1)
    command = [part.replace("{status_fd}", str(status_write)) for part in argv]
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env=environment,
            pass_fds=[status_write] if on_status_line else [],
        )
    except FileNotFoundError as exc:
        _close(status_read, status_write)
        raise UnsupportedError(f"{argv[0]} is not installed", capability=argv[0]) from exc
    except OSError as exc:
        _close(status_read, status_write)
        raise HostError(f"{argv[0]} can't be started: {exc}", errno=exc.errno or 0, target=argv[0]) from exc
    _close(status_write)
    try:
        with process:
            try:
                return _drain(process, status_read, on_status_line, argv[0], deadline_s)
            except BaseException:
                process.kill()
                raise
    finally:
        _close(status_read)


def _drain(
    process: subprocess.Popen[bytes],
    status_fd: int,
    on_status_line: Callable[[str], None] | None,
    tool: str,
    deadline_s: float,
) -> CommandResult:
    assert process.stdout is not None
    assert process.stderr is not None
    started = time.monotonic()
    kept = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    if on_status_line:
        kept[status_fd] = bytearray()
    with selectors.DefaultSelector() as selector:
        for descriptor in kept:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left_s = started + deadline_s - time.monotonic()
            ready = selector.select(left_s) if left_s > 0 else []
            if not ready:
                raise _too_slow(tool, deadline_s)
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fd)
                    continue
                buffer = kept[key.fd]
                buffer += chunk
                if on_status_line and key.fd == status_fd:
                    *lines, rest = bytes(buffer).split(b"\n")
                    buffer[:] = rest[-4096:]
                    for line in lines:
                        on_status_line(line.decode("utf-8", "replace"))
                elif len(buffer) > _MAX_OUTPUT_BYTES:
                    raise HostError(f"{tool} wrote more than {_MAX_OUTPUT_BYTES >> 20} MiB", target=tool)
    try:
        status = process.wait(max(0.1, started + deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired as exc:
        raise _too_slow(tool, deadline_s) from exc
    output, errors = (
        bytes(kept[pipe.fileno()]).decode("utf-8", "replace") for pipe in (process.stdout, process.stderr)
    )
    return CommandResult(status, output, errors)


def _too_slow(tool: str, deadline_s: float) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"{tool} did not end within {deadline_s:g} s", deadline_s=deadline_s, waited_s=deadline_s
    )


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
