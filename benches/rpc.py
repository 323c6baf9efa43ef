"""Latency of one agent call: our client, blocking and on asyncio, against peers on the same server.

``python benches/rpc.py [--json] [-n ROUNDS]`` with casemate installed (a release build) and cargo at hand.

Every variant is a long-lived process driven over a pipe. In each round every variant does a slice of the work, in reverse order
every second round, so a ratio compares times taken within the same second; the first round is a warm-up. The peers: ``raw``, a
hand-written Rust client with one write and one read a call (the floor); ``go``, containerd's Go client, which Kata's runtime uses;
``plain``, the usual design with a thread that reads and hands over to the caller or the event loop.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from casemate import _core
from casemate.bench.report import Figure, Report, ratios, summarize, table

ROOT = Path(__file__).resolve().parent.parent
BOUNDARY = (
    "call of the client with an encoded request -> encoded answer in the caller's hands, unix socket, one echo server for all; "
    "32 at once: the time of the window by 32; go also encodes and decodes its message"
)
# Calls in one slice, payload bytes, calls at once.
SHAPES = {
    "64B": (200, 64, 1),
    "64KiB": (60, 64 << 10, 1),
    "32x64B": (10, 64, 32),
    "32x64KiB": (4, 64 << 10, 32),
}
FACES = {
    "blocking": ("ours_blocking", {"raw": "raw", "go": "go", "plain": "plain_blocking"}),
    "asyncio": ("ours_asyncio", {"raw": "raw", "go": "go", "plain": "plain_asyncio"}),
}


class Side:
    """One variant's process and what it measured, by shape: microseconds a call, and of processor time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.wall_us: dict[str, list[float]] = {shape: [] for shape in SHAPES}
        self.cpu_us: dict[str, list[float]] = {shape: [] for shape in SHAPES}

    def slice(self, shape: str, *, counts: bool) -> None:
        """Let it do one slice."""
        count, size, window = SHAPES[shape]
        assert self._process.stdin is not None
        self._process.stdin.write(f"run {count} {size} {window}\n")
        self._process.stdin.flush()
        cpu_ns, *times_ns = map(int, _line(self._process).split())
        if counts:
            self.wall_us[shape] += [ns / 1000 for ns in times_ns]
            self.cpu_us[shape].append(cpu_ns / 1000 / count / window)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args!r} ended early with status {process.wait()}")
    return line.strip()


@contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if _line(process) != "ready":
            raise SystemExit(f"{command[0]} did not get ready")
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.kill()
        process.wait()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "casemate-bench"


def _build_rust() -> Path:
    """Directory of the built examples."""
    target = Path(os.environ.get("CARGO_TARGET_DIR") or _cache() / "target")
    command = [
        "cargo",
        "build",
        "--quiet",
        "--release",
        "--locked",
        "--package",
        "casemate-ttrpc",
        "--examples",
    ]
    subprocess.run([*command, "--target-dir", str(target)], cwd=ROOT, check=True)
    return target / "release" / "examples"


def _build_go(absent: dict[str, str]) -> Path | None:
    """The Go peer, or None with the reason in ``absent``."""
    if shutil.which("go") is None:
        absent["go"] = "there is no go on PATH"
        return None
    binary = _cache() / "go-ttrpc"
    binary.parent.mkdir(parents=True, exist_ok=True)
    command = ["go", "build", "-mod=readonly", "-o", str(binary), "."]
    done = subprocess.run(
        command, cwd=ROOT / "benches/peers/go-ttrpc", capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        absent["go"] = f"could not be built: {done.stderr.strip()[-200:]}"
        return None
    return binary


def _versions(go: Path | None) -> dict[str, str]:
    versions = {"casemate": _core.__version__, "python": platform.python_version()}
    versions["rustc"] = subprocess.run(
        ["rustc", "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    if go is not None:
        versions["go"] = subprocess.run(
            ["go", "version"], capture_output=True, text=True, check=True
        ).stdout.split()[2]
        lines = (ROOT / "benches/peers/go-ttrpc/go.mod").read_text("utf-8").splitlines()
        versions["containerd/ttrpc"] = next(line.split()[-1] for line in lines if "containerd/ttrpc" in line)
    return versions


def _raise_priority() -> str:
    """Server and all clients before other work of the host, where that is allowed; the niceness."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    except PermissionError:
        pass
    return str(os.getpriority(os.PRIO_PROCESS, 0))


def measure(rounds: int) -> Report:
    """Run everything in turn, return the report."""
    absent: dict[str, str] = {}
    niceness = _raise_priority()
    examples, go = _build_rust(), _build_go(absent)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="casemate-bench-"))
        path = str(Path(scratch) / "echo.sock")
        stack.enter_context(_started([str(examples / "echo_server"), path]))
        worker = [sys.executable, str(ROOT / "benches/rpc_worker.py")]
        commands = {
            "ours_blocking": [*worker, "blocking", path],
            "raw": [str(examples / "echo_peer"), "raw", path],
            "ours_asyncio": [*worker, "asyncio", path],
            "plain_blocking": [str(examples / "echo_peer"), "plain", path],
            "plain_asyncio": [*worker, "handover", path],
        }
        if go is not None:
            commands["go"] = [str(go), path]
        sides = {name: Side(stack.enter_context(_started(command))) for name, command in commands.items()}
        for number in range(rounds + 1):
            for shape in SHAPES:
                for name in list(sides) if number % 2 else reversed(sides):
                    sides[name].slice(shape, counts=number > 0)
    return Report(
        bench="rpc",
        boundary=BOUNDARY,
        host={
            "machine": platform.machine(),
            "kernel": platform.release(),
            "cpus": str(os.cpu_count()),
            "nice": niceness,
        },
        versions=_versions(go),
        figures=tuple(_figure(sides, face, shape) for shape in SHAPES for face in FACES),
        absent=absent,
    )


def _figure(sides: dict[str, Side], face: str, shape: str) -> Figure:
    name, peer_names = FACES[face]
    ours = summarize(sides[name].wall_us[shape], sides[name].cpu_us[shape])
    peers = {
        peer: summarize(sides[side].wall_us[shape], sides[side].cpu_us[shape])
        for peer, side in peer_names.items()
        if side in sides
    }
    return Figure(
        name=f"rpc_{shape}_{face}",
        unit="us",
        better="lower",
        n=len(sides[name].wall_us[shape]),
        failures=0,
        ours=ours,
        peers=peers,
        ratio=ratios(ours, peers),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Latency of one agent call, ours against peers.")
    parser.add_argument("-n", type=int, default=20, metavar="ROUNDS", help="rounds of slices (20)")
    parser.add_argument("--json", action="store_true", help="print the document, not a table")
    arguments = parser.parse_args()
    report = measure(arguments.n)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
        return
    for row in table(report):
        print("".join(f"{cell:<22}" if index == 0 else f"{cell:>10}" for index, cell in enumerate(row)))


if __name__ == "__main__":
    main()
