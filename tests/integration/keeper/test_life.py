"""A keeper's life: how it is started, what it holds, how it ends."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from casemate.errors import HostError, InvalidStateError
from casemate.keeper.client import KeeperClient
from casemate.persist.outcome import read_end
from casemate.persist.store import is_alive, is_owned, process_record
from tests.integration.keeper.conftest import NAME, WAIT_S, Kept, sleeper


def stat_of(pid: int) -> list[str]:
    """Fields of ``/proc/<pid>/stat`` from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_start_when_done_then_the_keeper_is_alone_in_its_session_without_a_terminal(kept: Kept) -> None:
    pid = kept.keeper.record.pid
    _, parent, _, session, terminal, *_ = stat_of(pid)
    assert (int(parent) != os.getpid(), int(session) != os.getsid(0), terminal) == (True, True, "0")
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
    assert Path(f"/proc/{pid}/cwd").resolve() == Path("/")
    assert (kept.path / "keeper.sock").stat().st_mode & 0o777 == 0o700 & 0o777
    assert (kept.path / "keeper.log").stat().st_mode & 0o077 == 0


def test_start_when_done_then_it_is_small(kept: Kept) -> None:
    kept.spawn(*sleeper())
    rollup = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{kept.keeper.record.pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    assert int(rollup["Private_Dirty"].split()[0]) < 2048
    assert len(os.listdir(f"/proc/{kept.keeper.record.pid}/task")) <= 3


def test_spawn_when_done_then_the_vmm_is_the_keepers_child_with_our_environment(kept: Kept) -> None:
    vmm = kept.spawn(*sleeper())
    assert int(stat_of(vmm.pid)[1]) == kept.keeper.record.pid
    environment = Path(f"/proc/{vmm.pid}/environ").read_bytes().split(b"\0")
    assert f"CASEMATE_STATE_ROOT={kept.settings.state_root}".encode() in environment
    assert Path(f"/proc/{vmm.pid}/cwd").resolve() == Path.cwd()
    assert vmm.exit_status() is None


def test_spawn_when_there_is_no_such_program_then_told_and_the_keeper_goes_on(kept: Kept) -> None:
    with pytest.raises(HostError, match="/no/such") as caught:
        kept.spawn("/no/such")
    assert caught.value.errno == errno.ENOENT
    assert kept.ask("status")["vmm_pid"] is None
    kept.spawn(*sleeper())


def test_leave_when_not_committed_then_vmm_and_keeper_end_and_nothing_looks_alive(kept: Kept) -> None:
    vmm = kept.spawn(*sleeper())
    kept.directory.release()
    assert not is_owned(kept.settings, NAME)
    kept.keeper.leave()
    kept.wait_gone(vmm.pid, kept.keeper.record.pid)
    assert read_end(kept.path) is None


def test_commit_when_done_then_the_sandbox_is_owned_by_the_keeper_alone(kept: Kept) -> None:
    vmm = kept.spawn(*sleeper())
    kept.commit()
    assert is_owned(kept.settings, NAME)
    assert kept.ask("status")["committed"] is True
    assert is_alive(process_record(vmm.pid))
    kept.ask("end")
    kept.wait_gone(vmm.pid, kept.keeper.record.pid)
    assert not is_owned(kept.settings, NAME)
    end = read_end(kept.path)
    assert end is not None
    assert (end.vmm_pid, end.status, end.wanted) == (vmm.pid, -signal.SIGKILL, True)
    assert vmm.wait(1) == -signal.SIGKILL
    assert not (kept.path / "keeper.sock").exists()


def test_commit_when_asked_by_somebody_else_then_refused(kept: Kept) -> None:
    kept.spawn(*sleeper())
    with (
        KeeperClient.connect(kept.path, NAME) as other,
        pytest.raises(InvalidStateError, match="creator's"),
    ):
        other.request("commit", timeout_s=WAIT_S, borrow_fds=[kept.directory.lock_fd])
    with pytest.raises(InvalidStateError, match="a VMM already"):
        kept.spawn(*sleeper())


def test_keeper_when_killed_then_its_vmm_ends_and_the_lock_is_free(kept: Kept) -> None:
    vmm = kept.spawn(*sleeper())
    kept.commit()
    os.kill(kept.keeper.record.pid, signal.SIGKILL)
    kept.wait_gone(vmm.pid)
    assert not is_owned(kept.settings, NAME)
    assert vmm.wait(WAIT_S) == 255
    with pytest.raises(InvalidStateError, match="its keeper has ended"):
        KeeperClient.connect(kept.path, NAME)
    (kept.path / "keeper.sock").unlink()


def test_keeper_when_asked_to_end_by_a_signal_then_the_vmm_ends_first_and_it_is_told(kept: Kept) -> None:
    vmm = kept.spawn(*sleeper())
    kept.commit()
    os.kill(kept.keeper.record.pid, signal.SIGTERM)
    kept.wait_gone(kept.keeper.record.pid)
    end = read_end(kept.path)
    assert end is not None
    assert (end.status, end.wanted, vmm.exit_status()) == (-signal.SIGKILL, True, -signal.SIGKILL)


def test_vmm_when_it_ends_by_itself_then_status_and_last_words_are_written_and_bounded(kept: Kept) -> None:
    script = (
        "yes console | head -c 300000; echo last words; yes err | head -c 300000 >&2; echo why >&2; exit 3"
    )
    vmm = kept.spawn("sh", "-c", script)
    kept.wait_gone(vmm.pid, kept.keeper.record.pid)
    end = read_end(kept.path)
    assert end is not None
    assert (end.status, end.wanted) == (3, False)
    assert end.stderr_tail.endswith("err\nwhy\n")
    assert end.console_tail.endswith("console\nlast words\n")
    assert {len(end.stderr_tail), len(end.console_tail)} == {16 << 10}
    assert end.describe() == "its VMM ended with status 3: why"
    assert (vmm.wait(1), vmm.console_tail()[-6:]) == (3, b"words\n")
    # Nothing else grows: of the console there is no file.
    assert sum(path.stat().st_size for path in kept.path.rglob("*") if path.is_file()) < 100_000


def test_tails_when_the_vmm_lives_then_they_are_what_it_has_said(kept: Kept) -> None:
    vmm = kept.spawn("sh", "-c", "echo hello; exec sleep 1000")
    while not vmm.console_tail():
        assert vmm.exit_status() is None
    assert vmm.console_tail() == b"hello\n"


def test_request_when_it_makes_no_sense_then_the_keeper_goes_on(kept: Kept) -> None:
    kept.spawn(*sleeper())
    kept.commit()
    for line in (b"\0" * 100 + b"\n", b"{}\n", b'{"op":"keep","container":"../x","agent":{"vsock":3}}\n'):
        with KeeperClient.connect(kept.path, NAME) as client:
            client._socket.sendall(line)
            with pytest.raises(Exception, match="makes no sense|no container's name"):
                client.receive(timeout_s=WAIT_S)
    with KeeperClient.connect(kept.path, NAME) as client:
        client._socket.settimeout(WAIT_S)
        with pytest.raises(OSError):
            client._socket.sendall(b"x" * (16 << 20))
    assert kept.ask("status")["committed"] is True


def test_turn_when_another_has_it_then_waits_for_its_end_and_the_status_names_it(kept: Kept) -> None:
    kept.spawn(*sleeper())
    kept.commit()
    first, second = KeeperClient.connect(kept.path, NAME), KeeperClient.connect(kept.path, NAME)
    with first, second:
        first.request("turn", timeout_s=WAIT_S, at="qmp")
        second.send("turn", at="qmp")
        assert kept.ask("status")["turns"] == {"qmp": os.getpid()}
        kept.ask("turn", at="state")
        with pytest.raises(TimeoutError):
            second.receive(timeout_s=0.05)
        first.close()
        assert second.receive(timeout_s=WAIT_S) == {}
