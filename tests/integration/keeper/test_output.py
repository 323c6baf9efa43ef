"""What a keeper takes down of containers, from an agent that a test plays."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casemate._sync.logs import LogReader
from casemate.errors import InvalidStateError, NotFoundError
from casemate.keeper.client import KeeperClient
from casemate.persist.logs import LogFiles, log_path
from casemate.persist.outcome import ExitRecord, read_end, read_exits
from tests.integration.keeper.conftest import NAME, Kept, sleeper
from tests.support.fake_agent import FakeAgent
from tests.support.ttrpc_peer import Peer, Request, field, number


@pytest.fixture(autouse=True)
def _running(kept: Kept) -> None:
    kept.spawn(*sleeper())
    kept.commit()


def follow(kept: Kept, container: str = "web") -> LogReader:
    return LogReader(
        LogFiles(log_path(kept.path, container)), container, keeper=KeeperClient.connect(kept.path, NAME)
    )


def bytes_of(reader: LogReader) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in reader:
        found[entry.stream] = found.get(entry.stream, b"") + entry.data
    return found


def exit_of(kept: Kept, container: str = "web") -> ExitRecord:
    return read_exits(kept.path)[container]


def test_keep_when_the_container_writes_and_ends_then_log_and_record_have_all(
    kept: Kept, agent: FakeAgent
) -> None:
    kept.keep(agent)
    agent.put(b"one\ntwo: ")
    agent.put(b"oops\n", stream="stderr")
    agent.put(b"2\n")
    agent.exit(7)
    assert bytes_of(follow(kept)) == {"stdout": b"one\ntwo: 2\n", "stderr": b"oops\n"}
    record = exit_of(kept)
    assert (record.status, record.cause, record.logged_bytes, record.lost_bytes) == (7, "exited", 16, 0)
    assert read_end(kept.path) is None


def test_follow_when_nothing_comes_then_it_waits_and_each_piece_wakes_it(
    kept: Kept, agent: FakeAgent
) -> None:
    kept.keep(agent)
    reader = iter(follow(kept))
    for number_ in range(20):
        threading.Timer(0.001, agent.put, [f"{number_}\n".encode()]).start()
        assert next(reader).data == f"{number_}\n".encode()
    agent.exit(0)
    assert list(reader) == []


def test_follow_when_the_log_is_rotated_again_and_again_then_an_attentive_reader_misses_nothing(
    kept: Kept, agent: FakeAgent
) -> None:
    kept.keep(agent)
    reader = iter(follow(kept))
    for count in range(60):
        piece = f"{count:04}".encode() * 1000 + b"\n"
        agent.put(piece)
        assert next(reader).data == piece
    agent.exit(0)
    assert list(reader) == []
    sizes = [path.stat().st_size for path in (kept.path / "logs").iterdir()]
    assert len(sizes) == 2 and max(sizes) <= 1 << 16


def test_keep_when_the_connection_breaks_then_it_is_made_again_and_the_rest_comes(
    kept: Kept, agent: FakeAgent
) -> None:
    kept.keep(agent)
    reader = iter(follow(kept))
    agent.put(b"before\n")
    assert next(reader).data == b"before\n"
    agent.break_connection()
    agent.wait_connected()
    agent.put(b"after\n")
    assert next(reader).data == b"after\n"
    agent.exit(1)
    assert list(reader) == []
    assert (exit_of(kept).status, agent.connections) == (1, 2)


def test_forget_when_the_container_was_removed_then_nothing_of_it_stays_and_the_name_is_free(
    kept: Kept, agent: FakeAgent
) -> None:
    kept.keep(agent)
    with pytest.raises(InvalidStateError, match="kept already"):
        kept.keep(agent)
    agent.put(b"x\n")
    agent.exit(0)
    bytes_of(follow(kept))
    kept.ask("forget", container="web")
    assert list((kept.path / "logs").iterdir()) == list((kept.path / "exits").iterdir()) == []
    with pytest.raises(NotFoundError):
        kept.ask("forget", container="web")
    kept.keep(agent)


def test_vmm_when_it_ends_before_the_container_then_the_record_says_so(kept: Kept, agent: FakeAgent) -> None:
    kept.keep(agent)
    reader = follow(kept)
    agent.put(b"last\n")
    entries = iter(reader)
    assert next(entries).data == b"last\n"
    assert kept.vmm is not None
    os.kill(kept.vmm.pid, signal.SIGTERM)
    assert list(entries) == []
    kept.wait_gone(kept.keeper.record.pid)
    record = exit_of(kept)
    assert (record.status, record.cause, record.text) == (
        None,
        "vmm_ended",
        "the VMM ended with status -15 before it",
    )
    end = read_end(kept.path)
    assert end is not None
    assert (end.status, end.wanted, end.problems) == (-signal.SIGTERM, False, ())


def garbage(peer: Peer, request: Request) -> None:
    peer.answer(request.stream, b"\xff" * 50)


def refusal(peer: Peer, request: Request) -> None:
    peer.refuse(request.stream, 5, "no such container")


def more_than_asked(peer: Peer, request: Request) -> None:
    flood = field(1, b"x" * (3 << 20))
    peer.answer(request.stream, number(1, 9) if request.method == "WaitProcess" else flood)


@pytest.mark.parametrize(
    ("answer", "status", "cause"),
    [(garbage, None, "unknown"), (refusal, None, "unknown"), (more_than_asked, 9, "exited")],
)
def test_agent_when_it_answers_nonsense_then_the_container_counts_as_ended_and_nothing_grows(
    kept: Kept, agent: FakeAgent, answer: object, status: int | None, cause: str
) -> None:
    agent.misbehave = answer  # type: ignore[assignment]
    kept.keep(agent)
    assert bytes_of(follow(kept)) == {}
    record = exit_of(kept)
    assert (record.status, record.cause, record.logged_bytes) == (status, cause, 0)
    assert kept.ask("status")["committed"] is True


def test_agent_when_it_breaks_off_in_every_answer_then_the_keeper_rests_between_its_tries(
    kept: Kept, agent: FakeAgent
) -> None:
    def hang_up(peer: Peer, request: Request) -> None:
        peer.send_frame(request.stream, b"\0" * 10, length=4 << 20)
        peer.socket.shutdown(2)

    agent.misbehave = hang_up
    kept.keep(agent)
    agent.wait_connected()
    before = cpu_ticks(kept)
    with pytest.raises(TimeoutError), follow(kept) as reader:
        assert reader._keeper is not None
        reader._keeper.request("follow", timeout_s=1.5, container="web", file=reader_inode(kept), offset=0)
    assert cpu_ticks(kept) - before < 20
    assert agent.connections < 30
    assert kept.ask("status")["agent_connected"] is False


def reader_inode(kept: Kept) -> int:
    return log_path(kept.path, "web").stat().st_ino


def cpu_ticks(kept: Kept) -> int:
    fields = Path(f"/proc/{kept.keeper.record.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of 128 KiB at ``path``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.root
def test_keep_when_the_disk_is_full_then_the_container_goes_on_and_what_is_lost_is_told(
    kept: Kept, agent: FakeAgent
) -> None:
    with small_disk(kept.path / "logs"):
        (kept.path / "logs" / "filler").write_bytes(b"x" * 100_000)
        kept.keep(agent)
        for _ in range(100):
            agent.put(b"y" * 1000 + b"\n")
        agent.exit(0)
        kept_bytes = bytes_of(follow(kept))["stdout"]
        record = exit_of(kept)
        assert record.status == 0
        assert record.lost_bytes > 0
        assert record.logged_bytes + record.lost_bytes == 100 * 1001
        assert len(kept_bytes) == record.logged_bytes
        assert "No space left" in str(record.log_error)
        # The log's files are the keeper's until it forgets them.
        kept.ask("forget", container="web")


@pytest.mark.root
def test_end_when_no_record_can_be_written_then_the_keeper_ends_and_the_end_record_says_so(
    kept: Kept, agent: FakeAgent
) -> None:
    with small_disk(kept.path / "exits"):
        with (kept.path / "exits" / "filler").open("wb", 0) as filler, pytest.raises(OSError):
            while True:
                filler.write(b"x" * 4096)
        kept.keep(agent)
        agent.exit(4)
        bytes_of(follow(kept))
        containers = kept.ask("status")["containers"]
        assert isinstance(containers, dict)
        assert (containers["web"]["is_unwritten"], containers["web"]["exit"]["status"]) == (True, 4)
        kept.ask("end")
        kept.wait_gone(kept.keeper.record.pid)
    end = read_end(kept.path)
    assert end is not None
    assert end.problems == ("the exit record of web could not be written",)
