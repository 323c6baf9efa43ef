"""One run of the lab: start, watch, end. Whatever happens, QEMU is gone and the scratch directory is removed."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from casemate import _core
from casemate.errors import CasemateError, DeadlineExceededError
from casemate.guest.store import Store
from tests.lab import LabError
from tests.lab.image import LabImage, require_space
from tests.lab.job import Job, read_results, write_job_disk, write_results_disk
from tests.lab.machine import CONSOLE_FD, JOB_FD, Machine, command_line

__all__ = ["Limits", "Outcome", "run_job"]

WORD = "casemate-lab: "
LOG_BYTES = 4 << 20
TAIL_LINES = 15
SPACE_MIB = 3072


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds until a step is given up.

    Args:
        boot_s: From QEMU's start until the lab is ready.
        grace_s: From the end of the job's time until the lab is off.
    """

    boot_s: float = 300.0
    grace_s: float = 120.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a job went: its exit status (124 when its time was over), seconds to ready, seconds in all, processor seconds of QEMU."""

    status: int
    ready_s: float
    whole_s: float
    cpu_s: float


def run_job(
    job: Job,
    image: LabImage,
    *,
    qemu: str,
    scratch: Path,
    results: Path,
    limits: Limits,
    output: BinaryIO,
    keyboard_fd: int | None = None,
    vcpus: int = 1,
) -> Outcome:
    """Run ``job`` in a lab of its own.

    Args:
        scratch: A cache below which the disks of this run are made; they are removed, also those of a run that was killed.
        results: Directory for what the job leaves, and ``console.log``, ``job.log``.
        output: Gets what the job writes, as it comes.
        keyboard_fd: What comes from there goes to the job.

    Raises:
        LabError: The lab did not come up, did not end, or left no results; the text has the end of its console.
    Blocks: until the lab is off, at most ``limits.boot_s + job.limit_s + limits.grace_s``.
    """
    if shutil.which(qemu) is None:
        raise LabError(f"{qemu} is not there: the lab runs on QEMU for x86-64 (package qemu-system-x86)")
    require_space(scratch, SPACE_MIB)
    results.mkdir(parents=True, exist_ok=True)
    with Store(scratch).staging("run") as directory:
        machine = Machine(
            qemu=qemu,
            kernel=image.kernel,
            root=image.root,
            job=directory / "job.tar",
            results=directory / "results.tar",
            limit_s=job.limit_s,
            shell=job.shell,
            vcpus=vcpus,
        )
        write_job_disk(job, machine.job)
        write_results_disk(machine.results)
        with (
            (results / "console.log").open("wb") as console_log,
            (results / "job.log").open("wb") as job_log,
            _started(machine, directory) as (process, console, guest),
        ):
            watch = _Watch(process, console, guest, console_log, job_log, output, keyboard_fd)
            times = watch.run(limits, job.limit_s)
        status = read_results(machine.results, results)
    return Outcome(status=status, ready_s=times[0], whole_s=times[1], cpu_s=times[2])


@contextlib.contextmanager
def _started(
    machine: Machine, directory: Path
) -> Iterator[tuple[_core.ChildProcess, socket.socket, socket.socket]]:
    """QEMU with the host's ends of its console and its job's terminal; killed at the end when it still runs."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        ours = [stack.enter_context(pair[0]) for pair in pairs]
        with pairs[0][1] as console, pairs[1][1] as job:
            # Its temporary file for what is written to the root lies with the other files of this run.
            environment = os.environ | {"TMPDIR": str(directory)}
            try:
                process = _core.spawn(
                    command_line(machine),
                    fds=[(console.fileno(), CONSOLE_FD), (job.fileno(), JOB_FD)],
                    env=environment,
                )
            except CasemateError as error:
                raise LabError(f"QEMU can't be started: {error}") from error
        stack.callback(_end, process)
        yield process, ours[0], ours[1]


def _end(process: _core.ChildProcess) -> None:
    if process.exit_status() is None:
        process.send_signal(9)
    with contextlib.suppress(DeadlineExceededError):
        process.wait(10)


class _Watch:
    """Passes on what the lab says until it is off."""

    def __init__(
        self,
        process: _core.ChildProcess,
        console: socket.socket,
        guest: socket.socket,
        console_log: BinaryIO,
        job_log: BinaryIO,
        output: BinaryIO,
        keyboard_fd: int | None,
    ) -> None:
        self._process = process
        self._sources: dict[int, Callable[[bytes], None]] = {
            console.fileno(): self._on_console,
            guest.fileno(): self._on_job,
        }
        # QEMU's ends are closed with it, so what is left in these comes without waiting.
        self._drained = tuple(self._sources)
        if keyboard_fd is not None:
            self._sources[keyboard_fd] = guest.sendall
        self._logs = (_Bounded(console_log), _Bounded(job_log))
        self._output = output
        self._console: tuple[str, ...] = ()
        self._line = b""
        self._ready_at: float | None = None
        self._fault = ""
        self._ended = False

    def run(self, limits: Limits, job_limit_s: int) -> tuple[float, float, float]:
        """Watch until QEMU ended. Returns: seconds to ready, seconds in all, processor seconds. Raises: LabError."""
        started = time.monotonic()
        deadline = started + limits.boot_s
        cpu_s = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.fileno(), selectors.EVENT_READ)
            for fd in self._sources:
                selector.register(fd, selectors.EVENT_READ)
            running = True
            while running:
                if self._ready_at is not None:
                    deadline = self._ready_at + job_limit_s + limits.grace_s
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise self._too_slow(limits, job_limit_s)
                for key, _ in selector.select(left_s):
                    if key.fd == self._process.fileno():
                        running = False
                    elif not self._pass_on(key.fd):
                        selector.unregister(key.fd)
                cpu_s = _cpu_seconds(self._process.pid) or cpu_s
        for fd in self._drained:
            while self._pass_on(fd):
                pass
        self._judge()
        assert self._ready_at is not None
        return self._ready_at - started, time.monotonic() - started, cpu_s

    def _pass_on(self, fd: int) -> bool:
        try:
            data = os.read(fd, 65536)
        except ConnectionResetError:
            data = b""
        if data:
            self._sources[fd](data)
        return bool(data)

    def _on_console(self, data: bytes) -> None:
        self._logs[0].write(data)
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            self._console = (*self._console, text)[-TAIL_LINES:]
            self._on_line(text)

    def _on_line(self, text: str) -> None:
        if not text.startswith(WORD):
            return
        what = text.removeprefix(WORD)
        if what.startswith("ready"):
            self._ready_at = time.monotonic()
        elif what.startswith("fault: "):
            self._fault = what.removeprefix("fault: ")
        elif what.startswith("ended"):
            self._ended = True

    def _on_job(self, data: bytes) -> None:
        self._logs[1].write(data)
        self._output.write(data)
        self._output.flush()

    def _judge(self) -> None:
        status = self._process.wait(10)
        if self._fault:
            raise LabError(self._fault)
        if self._ready_at is None:
            lines = self._process.stderr_tail().decode("utf-8", "replace").splitlines()
            # The processor model has more than emulation knows, and QEMU says so for each.
            said = "; ".join(line for line in lines if "TCG doesn't support requested feature" not in line)
            raise LabError(
                f"the lab's QEMU ended with status {status} before the lab was ready{': ' + said if said else ''}{self._tail()}"
            )
        if not self._ended:
            raise LabError(
                f"the lab went down in the middle of its job (QEMU's status {status}){self._tail()}"
            )

    def _too_slow(self, limits: Limits, job_limit_s: int) -> LabError:
        if self._ready_at is None:
            return LabError(f"the lab did not come up within {limits.boot_s:g} s{self._tail()}")
        whole_s = job_limit_s + limits.grace_s
        return LabError(
            f"the lab did not end within {whole_s:g} s of its job's start and was killed{self._tail()}"
        )

    def _tail(self) -> str:
        lines = [*self._console, self._line.decode("utf-8", "replace")]
        return "\nits console ends with:\n" + "\n".join(f"  {line}" for line in lines if line.strip())


class _Bounded:
    """A log file that takes no more than 4 MiB."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left_bytes = LOG_BYTES

    def write(self, data: bytes) -> None:
        self._file.write(data[: self._left_bytes])
        self._file.flush()
        self._left_bytes -= min(len(data), self._left_bytes)


def _cpu_seconds(pid: int) -> float:
    """User and system time of the process so far; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
