from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from casemate.observe.console import MAX_LINE_BYTES, ConsoleLines


def test_feed_when_lines_come_in_pieces_then_each_is_given_once_it_is_whole() -> None:
    lines = ConsoleLines()

    assert lines.feed(b"one\r\ntw") == ["one"]
    assert lines.feed(b"o\n\n\nthree") == ["two"]
    assert lines.feed(b"") == []
    assert lines.end() == ["three"]
    assert lines.end() == []


def test_feed_when_a_line_is_long_then_it_is_split_and_what_follows_is_read() -> None:
    lines = ConsoleLines()

    given = lines.feed(b"x" * (2 * MAX_LINE_BYTES + 5) + b"\nnext\n")

    assert [len(line) for line in given] == [MAX_LINE_BYTES, MAX_LINE_BYTES, 5, 4]


def test_feed_when_no_line_ever_ends_then_memory_stays_bounded() -> None:
    lines = ConsoleLines()
    tracemalloc.start()
    for _ in range(2000):
        lines.feed(b"y" * 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 16 * MAX_LINE_BYTES
    assert len(lines.end()[0]) <= MAX_LINE_BYTES


@given(st.lists(st.binary(max_size=50), max_size=30))
def test_feed_when_cut_anywhere_then_the_same_text_comes(pieces: list[bytes]) -> None:
    cut, whole = ConsoleLines(), ConsoleLines()

    by_pieces = [line for piece in pieces for line in cut.feed(piece)] + cut.end()

    assert by_pieces == whole.feed(b"".join(pieces)) + whole.end()
