from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from casemate.host import kept


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: int


def test_load_when_document_was_stored_then_it_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "document.json"

    assert kept.store(file, Document(7))

    assert kept.load(file, Document) == Document(7)
    assert [path.name for path in file.parent.iterdir()] == ["document.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"number": "x"}', b'{"number": 1, "more": 2}', b"[]"]
)
def test_load_when_document_is_damaged_then_there_is_none(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "document.json"
    file.write_bytes(content)

    assert kept.load(file, Document) is None


def test_load_when_it_is_a_directory_or_missing_then_there_is_none(tmp_path: Path) -> None:
    assert kept.load(tmp_path, Document) is None
    assert kept.load(tmp_path / "absent", Document) is None


def test_store_when_place_cannot_be_written_then_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert not kept.store(tmp_path / "file" / "document.json", Document(7))

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
