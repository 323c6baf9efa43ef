"""Native steps that are made to fail: each with the class of error that the list gives it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from casemate import _core
from casemate._compat import aio
from casemate.errors import AgentConnectionError, HostError, InvalidConfigError
from casemate.observe import failpoints
from tests.support.ttrpc_peer import Peer

Step = Callable[[], object]


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


def spawn() -> None:
    _core.spawn(["/bin/true"]).wait(10)


def call() -> bytes:
    peer = Peer()
    connection = _core.Connection(peer.client_fd())
    try:
        return connection.call_raw("s", "m", b"", 10.0)
    finally:
        connection.close()
        peer.close()


def unpack() -> None:
    _core.unpack_layer("/nonexistent", "/nonexistent", media_type="", digest="sha256:" + "0" * 64)


@pytest.mark.parametrize(
    ("point", "step"),
    [
        ("native.spawn", spawn),
        ("native.send", call),
        ("native.recv", call),
        ("native.unpack", unpack),
        ("native.connect", lambda: _core.connect_hybrid("/nonexistent", 1, timeout_s=10)),
    ],
)
def test_step_when_made_to_fail_then_its_class_and_text_once(point: str, step: Step) -> None:
    with failpoints.armed(f"{point}=1*error(made to fail)->off") as hits:
        with pytest.raises(failpoints.POINTS[point]) as caught:
            step()
        assert (type(caught.value), str(caught.value)) == (failpoints.POINTS[point], "made to fail")
        assert caught.value.op == point
        assert hits(point) == 1


def test_unpack_when_writing_a_member_fails_then_its_class(tmp_path: Path) -> None:
    layer, target = tmp_path / "layer.tar", tmp_path / "target"
    target.mkdir()
    with tarfile.open(layer, "w") as archive:
        member = tarfile.TarInfo("file")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"hello"))
    digest = "sha256:" + hashlib.sha256(layer.read_bytes()).hexdigest()
    with failpoints.armed("native.unpack_write=1*error(full)"), pytest.raises(HostError, match="^full$"):
        _core.unpack_layer(layer, target, media_type="", digest=digest)


@pytest.mark.parametrize("point", ["native.spawn", "native.send", "native.unpack"])
def test_step_when_cancelled_then_as_by_ctrl_c(point: str) -> None:
    step = {"native.spawn": spawn, "native.send": call, "native.unpack": unpack}[point]
    with failpoints.armed(f"{point}=1*cancel"), pytest.raises(KeyboardInterrupt):
        step()


def test_accept_when_made_to_fail_then_its_class(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "s") as listener,
        socket.socket(socket.AF_UNIX) as peer,
        failpoints.armed("native.accept=error(no)"),
    ):
        peer.connect(str(tmp_path / "s"))
        with pytest.raises(AgentConnectionError, match="^no$"):
            _core.accept(listener.fileno(), timeout_s=10)


def test_send_when_cancelled_then_the_connection_lives_and_nothing_was_sent() -> None:
    peer = Peer()
    connection = _core.Connection(peer.client_fd())
    with failpoints.armed("native.send=1*cancel"), pytest.raises(KeyboardInterrupt):
        connection.submit_raw("s", "m", b"lost")
    slot = connection.submit_raw("s", "m", b"kept")
    assert peer.receive().payload == b"kept"
    peer.answer(slot, b"x")
    assert connection.wait(slot) == b"x"
    connection.close()
    peer.close()


async def test_send_when_cancelled_in_a_task_then_the_task_is() -> None:
    peer = Peer()
    connection = aio.AgentConnection(peer.client_fd())
    with failpoints.armed("native.send=1*cancel"), pytest.raises(asyncio.CancelledError):
        await connection.call_raw("s", "m", b"", None)
    connection.close()
    peer.close()


def test_receive_when_it_fails_then_every_waiter_is_told() -> None:
    peer = Peer()
    connection = _core.Connection(peer.client_fd())
    slots = [connection.submit_raw("s", "m", b"") for _ in range(3)]
    with failpoints.armed("native.recv=1*error(gone)"), ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(connection.wait, slot).exception(20) for slot in slots]
    assert [str(end) for end in ends] == ["gone"] * 3
    assert connection.closed
    connection.close()
    peer.close()


def test_step_when_delayed_then_it_waits() -> None:
    with failpoints.armed("native.spawn=delay(30)"):
        started = time.monotonic()
        spawn()
        assert time.monotonic() - started >= 0.03


def test_armed_when_nested_then_the_outer_counts_go_on() -> None:
    with failpoints.armed("native.spawn=2*off->error(third)") as outer:
        spawn()
        with failpoints.armed("native.spawn=off") as inner:
            spawn()
            assert (outer("native.spawn"), inner("native.spawn")) == (1, 1)
        spawn()
        with pytest.raises(failpoints.POINTS["native.spawn"], match="^third$"):
            spawn()
    spawn()


def test_calling_when_the_point_is_native_then_refused() -> None:
    with pytest.raises(InvalidConfigError, match="native"), failpoints.calling("native.send", lambda: None):
        pass


def test_set_when_there_is_no_such_point_then_refused() -> None:
    with pytest.raises(InvalidConfigError, match='no native failpoint "native.nope"'):
        _core.set_failpoints({"native.nope": _core.FailpointScript([(None, "off", "")])})


OWNER = """
from casemate import _core
from casemate.observe import failpoints
failpoints.arm_from_settings("native.spawn=1*off->kill")
_core.spawn(["/bin/true"]).wait(10)
_core.spawn(["/bin/true"]).wait(10)
"""


def test_process_when_killed_at_a_native_point_then_by_sigkill() -> None:
    assert subprocess.run([sys.executable, "-c", OWNER]).returncode == -signal.SIGKILL
