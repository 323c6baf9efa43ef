"""The vsock backend as Python sees it; what it does for a guest is tested in Rust and in `tests/e2e`."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casemate import _core
from casemate.errors import HostError, InvalidConfigError

FORKED = """
import os, socket, sys
from casemate import _core
from casemate.errors import InternalError

ours, theirs = socket.socketpair()
backend = _core.VsockBackend(ours.detach(), sys.argv[1], 3)
child = os.fork()
if child == 0:
    for use in (backend.stats, backend.error, backend.close):
        try:
            use()
        except InternalError as error:
            assert "another process" in str(error)
        else:
            os._exit(1)
    sys.exit(0)  # with the finalisers that a child runs
assert os.waitpid(child, 0)[1] == 0
assert backend.error() is None and os.path.exists(sys.argv[1])
with socket.socket(socket.AF_UNIX) as dialler:
    dialler.connect(sys.argv[1])
backend.close()
assert not os.path.exists(sys.argv[1])
"""


def thread_names() -> list[str]:
    return [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def vmm() -> Iterator[socket.socket]:
    """The VMM's end of the last pair."""
    with socket.socket(socket.AF_UNIX) as end:
        yield end


@pytest.fixture
def vhost_fd(vmm: socket.socket) -> int:
    ours, theirs = socket.socketpair()
    os.dup2(theirs.fileno(), vmm.fileno(), inheritable=False)
    theirs.close()
    return ours.detach()


def test_backend_when_closed_then_socket_and_thread_are_gone(
    vhost_fd: int, vmm: socket.socket, tmp_path: Path
) -> None:
    path = tmp_path / "v"
    backend = _core.VsockBackend(vhost_fd, str(path), 3)
    assert path.is_socket()
    assert "casemate-vsock" in thread_names()
    assert backend.stats() == dict.fromkeys(
        (
            "bytes_in_total",
            "bytes_out_total",
            "connections_open",
            "connections_total",
            "packets_dropped_total",
            "packets_in_total",
            "packets_out_total",
            "resets_total",
        ),
        0,
    )
    begin = time.monotonic()
    backend.close()
    assert time.monotonic() - begin < 1
    assert not path.exists()
    assert "casemate-vsock" not in thread_names()
    assert vmm.recv(1) == b""
    backend.close()
    assert backend.error() is None


def test_backend_when_the_vmm_is_gone_then_error_says_so(
    vhost_fd: int, vmm: socket.socket, tmp_path: Path
) -> None:
    backend = _core.VsockBackend(vhost_fd, str(tmp_path / "v"), 3)
    vmm.close()
    wait_until(lambda: backend.error() is not None)
    assert backend.error() == "the VMM closed the vhost-user connection"
    assert not (tmp_path / "v").exists()
    backend.close()
    assert backend.error() is None


def test_backend_when_dropped_without_close_then_it_ends_by_itself(
    vhost_fd: int, vmm: socket.socket, tmp_path: Path
) -> None:
    backend = _core.VsockBackend(vhost_fd, str(tmp_path / "v"), 3)
    del backend
    assert vmm.recv(1) == b""
    wait_until(lambda: not (tmp_path / "v").exists() and "casemate-vsock" not in thread_names())


def test_backend_when_dialled_before_the_guest_is_there_then_closed_at_once(
    vhost_fd: int, vmm: socket.socket, tmp_path: Path
) -> None:
    backend = _core.VsockBackend(vhost_fd, str(tmp_path / "v"), 3)
    with socket.socket(socket.AF_UNIX) as dialler:
        dialler.settimeout(5)
        dialler.connect(str(tmp_path / "v"))
        dialler.sendall(b"CONNECT 1024\n")
        assert dialler.recv(1) == b""
    backend.close()


def test_backend_when_the_descriptor_is_not_open_then_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="not an open descriptor") as caught:
        _core.VsockBackend(1_000_000, str(tmp_path / "v"), 3)
    assert (caught.value.errno, caught.value.target) == (errno.EBADF, "take_vhost_fd")


def test_backend_when_the_path_exists_then_host_error_and_the_descriptor_is_closed(
    vhost_fd: int, vmm: socket.socket, tmp_path: Path
) -> None:
    path = tmp_path / "v"
    path.touch()
    with pytest.raises(HostError, match="Address already in use") as caught:
        _core.VsockBackend(vhost_fd, str(path), 3)
    assert (caught.value.errno, caught.value.target) == (errno.EADDRINUSE, str(path))
    assert path.is_file()
    assert vmm.recv(1) == b""


def test_backend_when_no_guest_may_have_the_context_id_then_config_error(
    vhost_fd: int, vmm: socket.socket, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfigError, match="context id 2") as caught:
        _core.VsockBackend(vhost_fd, str(tmp_path / "v"), 2)
    assert caught.value.path == "guest_cid"
    assert vmm.recv(1) == b""


def test_backend_when_the_process_forks_then_the_child_can_not_use_or_end_it(tmp_path: Path) -> None:
    script = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(tmp_path / "v")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
