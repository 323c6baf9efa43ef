"""Reading a container's log: entries, lines, times, rotated and damaged files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate.persist.logs import LogEntry, LogFiles, last_lines, log_path, parse_time_ns

TIME = "2026-11-25T00:33:27.000000005Z"
TIME_NS = 1_795_566_807_000_000_005


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = log_path(tmp_path, "web")
    path.parent.mkdir()
    return path


@pytest.fixture
def files(path: Path) -> Iterator[LogFiles]:
    with LogFiles(path) as files:
        yield files


def entry(data: bytes, stream: str = "stdout") -> LogEntry:
    return LogEntry(time_unix_ns=TIME_NS, stream=stream, data=data)


def line(text: str, tag: str = "F", stream: str = "stdout") -> str:
    return f"{TIME} {stream} {tag} {text}\n"


def test_parse_time_when_it_is_the_logs_form_then_nanoseconds() -> None:
    assert parse_time_ns(TIME) == TIME_NS
    assert parse_time_ns("1970-01-01T00:00:01Z") == 1_000_000_000
    assert parse_time_ns("1970-01-01T00:00:00.5Z") == 500_000_000


@pytest.mark.parametrize("text", ["", "now", "2026-11-25", "2026-11-25T00:33:27", "2026-11-25T00:33Z", "xZ"])
def test_parse_time_when_it_is_another_form_then_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_time_ns(text)


def test_read_when_there_is_no_file_yet_then_nothing_and_later_what_came(path: Path, files: LogFiles) -> None:
    assert (files.read(), files.position) == ([], (0, 0))
    path.write_text(line("one") + line("tw", "P") + line("err", stream="stderr") + line(""))
    assert files.read() == [entry(b"one\n"), entry(b"tw"), entry(b"err\n", "stderr"), entry(b"\n")]
    assert files.position == (path.stat().st_ino, path.stat().st_size)
    assert files.read() == []


def test_read_when_half_an_entry_is_there_then_it_comes_when_it_is_whole(path: Path, files: LogFiles) -> None:
    whole = line("one and more")
    path.write_text(whole[:40])
    assert files.read() == []
    with path.open("a") as file:
        file.write(whole[40:])
    assert files.read() == [entry(b"one and more\n")]


def test_read_when_rotated_then_the_older_file_comes_first_and_nothing_twice(
    path: Path, files: LogFiles
) -> None:
    path.with_name("web.log.1").write_text(line("1"))
    path.write_text(line("2"))
    assert [files.read(), files.read()] == [[entry(b"1\n")], [entry(b"2\n")]]
    with path.open("a") as file:
        file.write(line("3"))
    path.rename(path.with_name("web.log.1"))
    path.write_text(line("4"))
    assert [files.read(), files.read(), files.read()] == [[entry(b"3\n")], [entry(b"4\n")], []]


def test_read_when_what_was_read_is_cut_off_again_then_goes_on_behind_it(path: Path, files: LogFiles) -> None:
    path.write_text(line("one") + line("half")[:40])
    assert files.read() == [entry(b"one\n")]
    with path.open("r+") as file:
        file.truncate(len(line("one")))
    assert files.read() == []
    with path.open("a") as file:
        file.write(line("two"))
    assert files.read() == [entry(b"two\n")]


def test_read_when_an_entry_is_damaged_then_the_others_come(path: Path, files: LogFiles) -> None:
    path.write_bytes(b"\xff\xfe\n" + b"2026 stdout F x\n" + line("good").encode() + b"\n")
    assert files.read() == [entry(b"good\n")]


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (0, []),
        (1, [b"e"]),
        (2, [b"c", b"d\n", b"e"]),
        (3, [b"b\n", b"c", b"d\n", b"e"]),
        (9, [b"a\n", b"b\n", b"c", b"d\n", b"e"]),
    ],
)
def test_last_lines_when_parts_are_among_them_then_lines_are_counted(count: int, wanted: list[bytes]) -> None:
    entries = [entry(data) for data in (b"a\n", b"b\n", b"c", b"d\n", b"e")]
    assert [one.data for one in last_lines(entries, count)] == wanted
