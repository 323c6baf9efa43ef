"""Connections to a guest: hybrid sockets and accept, against sockets made here."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from casemate import _core
from casemate.errors import AgentConnectionError, DeadlineExceededError, HostError, InvalidConfigError


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(10)
        yield listener


def serve(listener: socket.socket, answers: list[bytes]) -> list[bytes]:
    """Answer one greeting a connection; return the greetings."""
    greetings = []
    for answer in answers:
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(10)
            greetings.append(peer.recv(100))
            peer.sendall(answer)
    return greetings


def test_connect_hybrid_when_answered_ok_then_a_connected_socket_with_all_that_follows(
    listener: socket.socket,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve, listener, [b"", b"NO\n", b"OK 1073741824\nfirst"])
        fd = _core.connect_hybrid(listener.getsockname(), 1024, timeout_s=10)
        assert serving.result(10) == [b"CONNECT 1024\n"] * 3
    with socket.socket(fileno=fd) as connected:
        assert connected.recv(100) == b"first"
        assert not os.get_inheritable(fd)
        assert os.get_blocking(fd)


def test_connect_hybrid_when_nobody_listens_then_deadline_exceeded_with_address_and_reason(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "none")
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError) as caught:
        _core.connect_hybrid(path, 1024, timeout_s=0.05)
    assert 0.05 <= time.monotonic() - started < 5
    assert (caught.value.deadline_s, caught.value.waited_s >= 0.05) == (0.05, True)
    assert f"hvsock://{path}:1024" in str(caught.value)
    assert "no such file" in str(caught.value).lower()


def test_connect_hybrid_when_the_watched_process_ends_then_connection_error(tmp_path: Path) -> None:
    child = _core.spawn(["sleep", "60"])
    threading.Timer(0.02, child.send_signal, (signal.SIGKILL,)).start()
    with pytest.raises(AgentConnectionError):
        _core.connect_hybrid(str(tmp_path / "none"), 1024, timeout_s=20, watch=child)
    child.wait(10)


def test_connect_hybrid_when_the_path_is_too_long_then_host_error() -> None:
    with pytest.raises(HostError) as caught:
        _core.connect_hybrid("/" + "x" * 200, 1024, timeout_s=5)
    assert caught.value.errno == 36


def test_accept_when_the_guest_connects_then_its_socket(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(listener.getsockname())
        fd = _core.accept(listener.fileno(), timeout_s=10)
        with socket.socket(fileno=fd) as accepted:
            guest.sendall(b"hello")
            assert accepted.recv(100) == b"hello"
            assert not os.get_inheritable(fd)


def test_accept_when_nobody_comes_or_the_time_is_no_time_then_typed_errors(listener: socket.socket) -> None:
    with pytest.raises(DeadlineExceededError):
        _core.accept(listener.fileno(), timeout_s=0.02)
    with pytest.raises(InvalidConfigError):
        _core.accept(listener.fileno(), timeout_s=-1)
    with pytest.raises(HostError):
        _core.accept(-1, timeout_s=1)


def test_accept_when_the_watched_process_ends_then_within_milliseconds(listener: socket.socket) -> None:
    child = _core.spawn(["sleep", "60"])
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        child.send_signal(signal.SIGKILL)

    threading.Timer(0.05, kill).start()
    with pytest.raises(AgentConnectionError, match="has ended"):
        _core.accept(listener.fileno(), timeout_s=20, watch=child)
    assert time.monotonic() - killed[0] < 0.1
    child.wait(10)


def test_accept_when_a_signal_handler_raises_then_the_wait_ends(listener: socket.socket) -> None:
    def raise_interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, raise_interrupt)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _core.accept(listener.fileno(), timeout_s=20)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
