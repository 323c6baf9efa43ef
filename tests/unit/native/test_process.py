"""Children tied to this process."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from casemate import _core
from casemate.errors import DeadlineExceededError, HostError, InternalError, InvalidConfigError

TAIL_BYTES = 64 << 10


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def await_end(pid: int) -> None:
    """Wait until a process that is no child of ours has ended."""
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"{pid} still runs"
        time.sleep(0.005)


def test_wait_when_it_exits_then_the_status_else_deadline_exceeded() -> None:
    assert _core.spawn(["sh", "-c", "exit 7"]).wait(10) == 7
    child = _core.spawn(["sleep", "60"])
    with pytest.raises(DeadlineExceededError) as caught:
        child.wait(0.03)
    assert caught.value.deadline_s == pytest.approx(0.03)
    assert 0.03 <= caught.value.waited_s < 5
    assert child.exit_status() is None
    assert child.send_signal(signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM
    assert child.exit_status() == -signal.SIGTERM
    assert not child.send_signal(signal.SIGTERM)


def test_send_signal_when_there_is_no_such_signal_then_host_error() -> None:
    child = _core.spawn(["sleep", "60"])
    with pytest.raises(HostError) as caught:
        child.send_signal(999)
    assert (caught.value.errno, caught.value.target) == (errno.EINVAL, "pidfd_send_signal")
    child.send_signal(signal.SIGKILL)
    child.wait(10)


def test_pid_when_started_then_with_start_time_it_names_the_process() -> None:
    child = _core.spawn(["sleep", "60"])
    fields = Path(f"/proc/{child.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    assert child.start_time_ticks == int(fields[19])
    assert int(fields[1]) == os.getpid()
    child.send_signal(signal.SIGKILL)
    child.wait(10)


@pytest.mark.parametrize(
    ("program", "number"),
    [("/no/such/program", errno.ENOENT), ("no-such-program", errno.ENOENT), ("/etc/passwd", errno.EACCES)],
)
def test_spawn_when_the_program_can_not_be_executed_then_host_error_with_errno_and_target(
    program: str, number: int
) -> None:
    with pytest.raises(HostError) as caught:
        _core.spawn([program])
    assert (caught.value.errno, caught.value.target) == (number, program)
    assert os.strerror(number).lower() in str(caught.value).lower()


def test_spawn_when_arguments_make_no_sense_then_typed_errors() -> None:
    with pytest.raises(InvalidConfigError):
        _core.spawn([])
    with pytest.raises(InvalidConfigError):
        _core.spawn(["true"], fds=[(0, 5), (0, 5)])
    with pytest.raises(HostError) as caught:
        _core.spawn(["true"], fds=[(999_999, 5)])
    assert (caught.value.errno, caught.value.target) == (errno.EBADF, "descriptor 999999")


def test_spawn_when_descriptors_are_given_then_the_child_has_them_and_nothing_else() -> None:
    ours, theirs = socket.socketpair()
    leaked = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    child = _core.spawn(["sh", "-c", "echo hello >&9; ls /proc/self/fd >&2"], fds=[(theirs.fileno(), 9)])
    theirs.close()
    os.close(leaked)
    assert child.wait(10) == 0
    with ours, ours.makefile() as lines:
        assert lines.readlines() == ["hello\n"]
    # 3 is the directory that ls lists.
    assert child.stderr_tail().decode().split() == ["0", "1", "2", "3", "9"]


def test_spawn_when_environment_and_directory_are_given_then_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_TEST_INHERITED", "yes")
    inherited = _core.spawn(["sh", "-c", "echo $CASEMATE_TEST_INHERITED >&2"])
    whole = _core.spawn(
        ["/bin/sh", "-c", "echo $ONE $CASEMATE_TEST_INHERITED $PWD >&2"], env={"ONE": "1"}, cwd="/usr"
    )
    assert (inherited.wait(10), whole.wait(10)) == (0, 0)
    assert inherited.stderr_tail() == b"yes\n"
    assert whole.stderr_tail() == b"1 /usr\n"


def test_tails_when_much_is_written_then_bounded_and_whole_at_the_end() -> None:
    ours, theirs = socket.socketpair()
    child = _core.spawn(
        [
            "sh",
            "-c",
            "head -c 1000000 /dev/zero >&2; head -c 1000000 /dev/zero >&3; echo end >&3; echo end >&2",
        ],
        fds=[(theirs.fileno(), 3)],
        take_console_fd=ours.detach(),
    )
    theirs.close()
    assert child.wait(10) == 0
    for tail in (child.stderr_tail(), child.console_tail()):
        assert len(tail) == TAIL_BYTES
        assert tail.endswith(b"\0end\n")


def test_fileno_when_it_ends_then_readable() -> None:
    child = _core.spawn(["sleep", "0.05"])
    assert select.select([child.fileno()], [], [], 10)[0] == [child.fileno()]
    assert child.wait(10) == 0


def test_spawn_when_the_calling_thread_ends_then_the_child_lives_on() -> None:
    children: list[_core.ChildProcess] = []
    thread = threading.Thread(target=lambda: children.append(_core.spawn(["sleep", "60"])))
    thread.start()
    thread.join()
    with pytest.raises(DeadlineExceededError):
        children[0].wait(0.1)
    assert is_running(children[0].pid)
    children[0].send_signal(signal.SIGKILL)
    assert children[0].wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("where", ["main", "pool"])
def test_spawn_when_the_owner_is_killed_then_the_child_ends(where: str) -> None:
    code = """
import sys, threading
from casemate import _core
pids = []
def start(): pids.append(_core.spawn(["sleep", "60"]).pid)
if sys.argv[1] == "main":
    start()
else:
    thread = threading.Thread(target=start); thread.start(); thread.join()
print(pids[0], flush=True)
sys.stdin.read()
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code, where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        owner.send_signal(signal.SIGKILL)
    await_end(pid)


def test_child_when_its_handle_is_dropped_then_reaped_all_the_same() -> None:
    child = _core.spawn(["sleep", "0.05"])
    pid = child.pid
    del child
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_wait_when_a_signal_handler_raises_then_the_wait_ends() -> None:
    child = _core.spawn(["sleep", "60"])

    def raise_interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, raise_interrupt)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            child.wait(20)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
    child.send_signal(signal.SIGKILL)
    child.wait(10)


def test_child_when_used_after_a_fork_then_internal_error_and_a_new_one_can_be_started() -> None:
    child = _core.spawn(["sleep", "60"])
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # The forked process: nothing of the test's frames may run on in it.
        try:
            child.exit_status()
            text = b"no error"
        except InternalError:
            text = b"%d" % _core.spawn(["sh", "-c", "exit 3"]).wait(10)
        os.write(writer, text)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"3"
    os.waitpid(pid, 0)
    child.send_signal(signal.SIGKILL)
    child.wait(10)
