"""Latency of one agent call: our client by both faces, against peers on the same server.

Every variant is a long-lived process driven over a pipe. In each round every variant does a slice of the work, in reverse order
every second round, so a ratio compares times taken within the same second; the first round is a warm-up. The peers: ``raw``, a
hand-written Rust client with one write and one read a call (the floor); ``go``, containerd's Go client, which Kata's runtime
uses; ``rust``, the crate ttrpc on one thread.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from casemate import _core
from casemate.bench import peers
from casemate.bench.report import Figure, Report, host_facts, own_versions, ratios, summarize
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.errors import CasemateError, HostError

__all__ = ["BOUNDARY", "SHAPES", "measure"]

BOUNDARY = (
    "call of the client with an encoded request -> encoded answer in the caller's hands; one echo server for all, over a unix "
    "socket; vsock_: the guest's agent; pipelined: 32 calls at once, the time of the window by 32; go also encodes and "
    "decodes its message"
)


class Shape(msgspec.Struct, frozen=True):
    """Calls in one slice, and in one over vsock; payload bytes; calls at once."""

    count: int
    vsock_count: int
    size_bytes: int
    window: int


SHAPES = {
    "64b": Shape(200, 40, 64, 1),
    "64kib": Shape(60, 10, 64 << 10, 1),
    "pipelined": Shape(4, 1, 64 << 10, 32),
}
FACES = ("sync", "async")
WORKER = (sys.executable, "-m", "casemate.bench.rpc_worker")


class Side:
    """One variant's process and what it measured, by shape: microseconds a call, and of processor time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.wall_us: dict[str, list[float]] = {shape: [] for shape in SHAPES}
        self.cpu_us: dict[str, list[float]] = {shape: [] for shape in SHAPES}

    def slice(self, name: str, count: int, *, counts: bool) -> None:
        """Let it do one slice. Raises: HostError when it ended."""
        shape = SHAPES[name]
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"run {count} {shape.size_bytes} {shape.window}\n")
            self._process.stdin.flush()
        cpu_ns, *times_ns = map(int, _line(self._process).split())
        if counts:
            self.wall_us[name] += [ns / 1000 for ns in times_ns]
            self.cpu_us[name].append(cpu_ns / 1000 / count / shape.window)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise HostError(f"{process.args!r} ended early with status {process.wait()}", target="benchmark")
    return line.strip()


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if _line(process) != "ready":
                raise HostError(f"{command[0]} did not get ready", target=command[0])
            yield process
        finally:
            process.kill()


def measure(
    *,
    rounds: int,
    settings: Settings,
    vsock: SandboxConfig | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run everything in turn, return the report. Blocks: for all of it, and first for the build of the peers.

    Args:
        rounds: Slices of each variant and shape that count.
        vsock: Measure over vsock too, with the agent of a sandbox of this configuration.

    Raises:
        HostError: A client or the server of the measurement ended.
    """
    absent: dict[str, str] = {}
    if not _core.__optimized__:
        progress("the native parts are built for work on the tree: their speed says nothing")
    progress("building the peers")
    rust = peers.build_rust(settings.cache_root, absent)
    go = peers.build_go(settings.cache_root, absent)
    niceness = _raise_priority()
    figures = _measure_unix(rust, go, rounds, progress)
    if vsock is not None:
        try:
            figures += _measure_vsock(vsock, rounds, settings, progress)
        except CasemateError as error:
            absent["vsock"] = f"no figures over vsock: {error}"
    host = {
        **host_facts(),
        "nice": niceness,
        "optimized": str(_core.__optimized__).lower(),
    }
    return Report(
        bench="rpc",
        boundary=BOUNDARY,
        host=host,
        versions=_versions(rust, go),
        figures=tuple(figures),
        absent=absent,
    )


def _measure_unix(
    rust: Path | None, go: Path | None, rounds: int, progress: Callable[[str], None]
) -> list[Figure]:
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="casemate-bench-"))
        path = str(Path(scratch) / "echo.sock")
        stack.enter_context(_started([*WORKER, "serve", path]))
        commands = {face: [*WORKER, face, path] for face in FACES}
        if rust is not None:
            commands |= {"raw": [str(rust), "bench-raw", path], "rust": [str(rust), "bench-crate", path]}
        if go is not None:
            commands["go"] = [str(go), "bench", path]
        sides = {name: Side(stack.enter_context(_started(command))) for name, command in commands.items()}
        _run(sides, {name: shape.count for name, shape in SHAPES.items()}, rounds, progress)
    others = {name: side for name, side in sides.items() if name not in FACES}
    return _figures("", sides, others)


def _measure_vsock(
    config: SandboxConfig, rounds: int, settings: Settings, progress: Callable[[str], None]
) -> list[Figure]:
    from casemate._sync.sandbox import Sandbox

    with ExitStack() as stack:
        progress("starting a sandbox")
        sandbox = stack.enter_context(Sandbox.create(config, settings=settings))
        sides = {
            face: Side(stack.enter_context(_started([*WORKER, face, sandbox.agent_url]))) for face in FACES
        }
        _run(sides, {name: shape.vsock_count for name, shape in SHAPES.items()}, rounds, progress)
    return _figures("vsock_", sides, {})


def _run(
    sides: dict[str, Side], counts: dict[str, int], rounds: int, progress: Callable[[str], None]
) -> None:
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}")
        for name, count in counts.items():
            for side in list(sides.values()) if number % 2 else reversed(sides.values()):
                side.slice(name, count, counts=number > 0)


def _figures(prefix: str, sides: dict[str, Side], others: dict[str, Side]) -> list[Figure]:
    figures = []
    for shape in SHAPES:
        summaries = {
            name: summarize(side.wall_us[shape], side.cpu_us[shape]) for name, side in others.items()
        }
        for face in FACES:
            side = sides[face]
            ours = summarize(side.wall_us[shape], side.cpu_us[shape])
            figures.append(
                Figure(
                    name=f"{prefix}{shape}_{face}",
                    unit="us",
                    better="lower",
                    n=len(side.wall_us[shape]),
                    failures=0,
                    ours=ours,
                    peers=summaries,
                    ratio=ratios(ours, summaries),
                )
            )
    return figures


def _raise_priority() -> str:
    """Server and all clients before other work of the host, where that is allowed; the niceness."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    return str(os.getpriority(os.PRIO_PROCESS, 0))


def _versions(rust: Path | None, go: Path | None) -> dict[str, str]:
    versions = own_versions()
    if rust is not None:
        versions["rustc"] = peers.version_of("rustc", "--version")
        lock = (peers.SOURCES / "rust" / "Cargo.lock").read_text("utf-8")
        versions["ttrpc"] = lock.partition('name = "ttrpc"\nversion = "')[2].partition('"')[0]
    if go is not None:
        versions["go"] = peers.version_of("go", "version")
        lines = (peers.SOURCES / "go" / "go.mod").read_text("utf-8").splitlines()
        versions["containerd/ttrpc"] = next(line.split()[-1] for line in lines if "containerd/ttrpc" in line)
    return versions
