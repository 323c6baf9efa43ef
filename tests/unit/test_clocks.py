"""Every wait is measured by a clock that nobody sets: the host's time may jump at any moment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import casemate

PACKAGE = Path(casemate.__file__).parent
ROOT = Path(__file__).resolve().parents[2]

# The host's time as what it is: when something was made or said, and how old a file is.
NATIVE_STAMPS = {"casemate-shim/src/clock.rs"}
STAMPS = {
    "_async/boot_proof.py",
    "_async/guest.py",
    "_async/sandbox.py",
    "cli/logs.py",
    "cli/ps.py",
    "guest/kernel.py",
    "guest/store.py",
    "hypervisor/fake/vmm.py",
    "images/collection.py",
    "images/store.py",
}

# The same in the crates: the times of a log's lines.
NATIVE_STAMPS = {"casemate-shim/src/clock.rs"}

JUMPING = """
import threading, time
real = time.time

def jumped():
    # Back an hour and on an hour, by turns.
    jumped.sign = -jumped.sign
    return real() + 3600 * jumped.sign

jumped.sign = 1
time.time = jumped
time.time_ns = lambda: int(jumped() * 1e9)

import asyncio, socket
from casemate import _core
from casemate._compat import aio, blocking
from casemate.errors import DeadlineExceededError

def waited(call):
    started = time.monotonic()
    try:
        call()
    except DeadlineExceededError:
        return time.monotonic() - started
    return -1.0

ours, theirs = socket.socketpair()
connection = blocking.AgentConnection(ours.detach())
print(waited(lambda: connection.call_raw("s", "m", b"", 0.2)))

async def call():
    ours, theirs = socket.socketpair()
    connection = aio.AgentConnection(ours.detach())
    try:
        await connection.call_raw("s", "m", b"", 0.2)
    finally:
        connection.close()
        theirs.close()

print(waited(lambda: asyncio.run(call())))
print(waited(lambda: _core.connect_hybrid("/nonexistent", 1, timeout_s=0.2)))
connection.close()
theirs.close()
"""


def test_source_when_it_asks_for_the_hosts_time_then_for_a_stamp_only() -> None:
    asking = re.compile(r"\btime\.time(?:_ns)?\b|\bdatetime\.(?:now|utcnow)\b|CLOCK_REALTIME")
    paths = (path for path in PACKAGE.rglob("*.py") if "_sync" not in path.parts)
    found = {str(path.relative_to(PACKAGE)) for path in paths if asking.search(path.read_text("utf-8"))}
    assert found == STAMPS


def test_native_source_when_it_asks_for_the_hosts_time_then_for_a_stamp_only() -> None:
    asking = re.compile(r"\bSystemTime\b|CLOCK_REALTIME")
    paths = ROOT.glob("rust/*/src/**/*.rs")
    found = {str(path.relative_to(ROOT / "rust")) for path in paths if asking.search(path.read_text("utf-8"))}
    assert found == NATIVE_STAMPS


def test_wait_when_the_hosts_time_jumps_then_its_deadline_stays() -> None:
    done = subprocess.run([sys.executable, "-c", JUMPING], capture_output=True, text=True, timeout=25)
    assert done.stderr == ""
    waits = [float(line) for line in done.stdout.split()]
    assert len(waits) == 3
    assert all(0.2 <= wait < 5 for wait in waits), waits
