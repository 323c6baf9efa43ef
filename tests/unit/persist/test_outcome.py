"""What a keeper leaves: ends of containers and of the VMM, seen in the record."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from casemate.persist.outcome import EndRecord, ExitRecord, read_end, read_exits, with_outcomes
from casemate.persist.record import ProcessRecord, SandboxRecord, with_container
from casemate.types import State
from tests.unit.persist.test_store import record

END = EndRecord(version=1, vmm_pid=7, status=-9, wanted=False, ended_unix_ns=1, stderr_tail="a\nqemu: no\n\n")
EXIT = ExitRecord(
    version=1, container_id="c", status=3, cause="exited", text="it exited with status 3", ended_unix_ns=1
)


def kept() -> SandboxRecord:
    return msgspec.structs.replace(record(), keeper=ProcessRecord(pid=1, start_time_ticks=1))


def test_with_outcomes_when_nothing_has_ended_then_the_record_is_as_it_was(tmp_path: Path) -> None:
    assert with_outcomes(kept(), tmp_path) == kept()
    assert (read_end(tmp_path), read_exits(tmp_path)) == (None, {})


def test_with_outcomes_when_container_and_vmm_have_ended_then_both_show(tmp_path: Path) -> None:
    (tmp_path / "exits").mkdir()
    (tmp_path / "exits" / "c.json").write_bytes(msgspec.json.encode(EXIT))
    (tmp_path / "end.json").write_bytes(msgspec.json.encode(END))
    seen = with_outcomes(kept(), tmp_path)
    assert (seen.state, seen.containers[0].state, seen.containers[0].exit_code) == (
        State.STOPPED,
        State.STOPPED,
        3,
    )
    assert with_outcomes(record(), tmp_path) == record()


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b'{"version":1}', b"\xff"])
def test_read_when_a_record_is_damaged_then_it_counts_as_not_there(tmp_path: Path, document: bytes) -> None:
    (tmp_path / "exits").mkdir()
    (tmp_path / "exits" / "c.json").write_bytes(document)
    (tmp_path / "end.json").write_bytes(document)
    assert (read_end(tmp_path), read_exits(tmp_path)) == (None, {})


def test_read_when_a_record_is_newer_then_it_counts_as_not_there(tmp_path: Path) -> None:
    (tmp_path / "end.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(END, version=2)))
    assert read_end(tmp_path) is None


@pytest.mark.parametrize(
    ("status", "text"),
    [(-9, "its VMM was ended by signal 9: qemu: no"), (1, "its VMM ended with status 1: qemu: no")],
)
def test_describe_then_how_it_ended_and_the_last_thing_it_said(status: int, text: str) -> None:
    assert msgspec.structs.replace(END, status=status).describe() == text


def test_with_container_when_changed_added_or_removed_then_the_others_and_the_order_stay() -> None:
    (first,) = record().containers
    second = msgspec.structs.replace(first, id="d")
    both = with_container(record(), "d", second)
    assert [one.id for one in both.containers] == ["c", "d"]
    changed = with_container(both, "c", msgspec.structs.replace(first, state=State.RUNNING))
    assert [(one.id, one.state) for one in changed.containers] == [("c", State.RUNNING), ("d", State.READY)]
    assert with_container(changed, "c", None).containers == (second,)
    assert with_container(record(), "unknown", None) == record()
