from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.errors import CasemateError, HypervisorError, InvalidStateError, UnsupportedError
from casemate.hypervisor.qemu.qmp import Event, Greeting, QmpProtocol, Reply, matches

# As QEMU 7.2 sends it.
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7"}, '
    b'"capabilities": ["oob"]}}\r\n'
)
SHUTDOWN = (
    b'{"timestamp": {"seconds": 1700000000, "microseconds": 813602}, "event": "SHUTDOWN", '
    b'"data": {"guest": false, "reason": "host-qmp-quit"}}\r\n'
)


def ready(**arguments: Any) -> QmpProtocol:
    protocol = QmpProtocol(**arguments)
    protocol.feed(GREETING)
    return protocol


def answer(number: object, **members: Any) -> bytes:
    return json.dumps({"id": number, **members}).encode() + b"\r\n"


def test_feed_when_greeting_comes_then_version_and_capabilities_are_known() -> None:
    protocol = QmpProtocol()

    assert protocol.feed(GREETING) == [
        Greeting(version=(7, 2, 22), package="Debian 1:7.2+dfsg-7", capabilities=frozenset({"oob"}))
    ]


def test_negotiation_when_oob_is_offered_then_it_is_taken_and_used_where_it_helps() -> None:
    protocol = ready()
    _, line = protocol.negotiation()

    assert json.loads(line) == {"execute": "qmp_capabilities", "id": 1, "arguments": {"enable": ["oob"]}}
    assert "exec-oob" in json.loads(protocol.encode("yank", {"instances": []})[1])
    assert "execute" in json.loads(protocol.encode("quit")[1])


def test_negotiation_when_oob_is_not_offered_then_it_is_not_asked_for() -> None:
    protocol = QmpProtocol()
    protocol.feed(GREETING.replace(b'"oob"', b""))

    assert json.loads(protocol.negotiation()[1]) == {"execute": "qmp_capabilities", "id": 1}
    assert "execute" in json.loads(protocol.encode("yank")[1])


def test_encode_when_qemu_has_not_greeted_then_is_refused() -> None:
    with pytest.raises(InvalidStateError, match="greeted"):
        QmpProtocol().encode("stop")


def test_feed_when_answers_come_out_of_order_then_each_finds_its_command() -> None:
    protocol = ready()
    first, _ = protocol.encode("query-status")
    second, _ = protocol.encode("bogus")

    replies = protocol.feed(
        answer(second, error={"class": "CommandNotFound", "desc": "The command bogus has not been found"})
        + answer(first, **{"return": {"status": "running"}})
    )

    assert isinstance(replies[0], Reply)
    assert replies[0].error is not None
    assert (replies[0].error.command, replies[0].error.error_class) == ("bogus", "CommandNotFound")
    assert str(replies[0].error) == "QEMU refused bogus: The command bogus has not been found"
    assert replies[1] == Reply(id=first, value={"status": "running"})
    assert protocol.open_count == 0


@pytest.mark.parametrize("value", [{}, [], None, 0, "", False])
def test_feed_when_the_returned_value_is_empty_then_it_is_an_answer(value: object) -> None:
    protocol = ready()
    number, _ = protocol.encode("human-monitor-command")

    assert protocol.feed(answer(number, **{"return": value})) == [Reply(id=number, value=value)]


def test_feed_when_event_comes_then_time_is_in_microseconds() -> None:
    assert ready().feed(SHUTDOWN) == [
        Event(
            name="SHUTDOWN", data={"guest": False, "reason": "host-qmp-quit"}, time_us=1_700_000_000_813_602
        )
    ]


def test_feed_when_qemu_has_no_clock_then_time_is_unknown() -> None:
    line = b'{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}\n'

    assert ready().feed(line) == [Event(name="STOP", data={}, time_us=None)]


def test_feed_when_an_event_precedes_the_greeting_then_both_are_told() -> None:
    assert [type(message) for message in QmpProtocol().feed(SHUTDOWN + GREETING)] == [Event, Greeting]


@pytest.mark.parametrize("major", [2, 4])
def test_feed_when_qemu_is_too_old_then_is_refused(major: int) -> None:
    protocol = QmpProtocol()

    with pytest.raises(UnsupportedError, match=f"version {major}") as caught:
        protocol.feed(GREETING.replace(b'"major": 7', f'"major": {major}'.encode()))
    assert caught.value.capability == "qemu"
    with pytest.raises(InvalidStateError):
        protocol.encode("stop")


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b"[]\n",
        b'"x"\n',
        b"{}\n",
        b'{"return": 1}\n',
        b'{"return": 1, "id": 99}\n',
        b'{"return": 1, "id": true}\n',
        b'{"return": 1, "id": [1]}\n',
        b'{"event": 3}\n',
        b'{"event": "X", "data": 3}\n',
        b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        GREETING,
    ],
)
def test_feed_when_line_is_no_qmp_then_the_conversation_ends_for_good(line: bytes) -> None:
    protocol = ready()

    with pytest.raises(HypervisorError):
        protocol.feed(line)
    with pytest.raises(InvalidStateError):
        protocol.feed(SHUTDOWN)
    with pytest.raises(InvalidStateError):
        protocol.encode("stop")


def test_feed_when_an_answer_has_200_kib_then_it_is_read() -> None:
    protocol = ready()
    number, _ = protocol.encode("query-qmp-schema")

    assert protocol.feed(answer(number, **{"return": "x" * 204_800})) == [
        Reply(id=number, value="x" * 204_800)
    ]


def test_feed_when_a_line_never_ends_then_memory_is_bounded() -> None:
    protocol = ready(max_line_bytes=1000)

    protocol.feed(b"x" * 1000)
    with pytest.raises(HypervisorError, match="more than 1000 bytes"):
        protocol.feed(b"x")


messages = st.lists(
    st.one_of(
        st.builds(
            lambda name, data: ("event", name, data),
            st.text(min_size=1, max_size=20),
            st.dictionaries(st.text(max_size=5), st.integers(-(2**53), 2**53), max_size=3),
        ),
        st.builds(
            lambda value: ("reply", value, None), st.one_of(st.none(), st.booleans(), st.text(max_size=20))
        ),
    ),
    max_size=8,
)


@given(messages, st.lists(st.integers(1, 40), max_size=40), st.booleans())
def test_feed_when_bytes_come_in_any_pieces_then_gives_the_same_messages(
    sent: list[tuple[str, Any, Any]], sizes: list[int], crlf: bool
) -> None:
    protocol = ready()
    text = b""
    expected: list[object] = []
    for kind, first, second in sent:
        if kind == "event":
            text += json.dumps({"event": first, "data": second}).encode()
            expected.append(Event(name=first, data=second))
        else:
            number, _ = protocol.encode("x")
            text += json.dumps({"return": first, "id": number}, ensure_ascii=False).encode()
            expected.append(Reply(id=number, value=first))
        text += b"\r\n" if crlf else b"\n"

    got: list[object] = []
    for size in sizes:
        got += protocol.feed(text[:size])
        text = text[size:]
    got += protocol.feed(text)

    assert got == expected


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from([GREETING, SHUTDOWN, b"{}\n", b'{"id": 1, "return": 2}\n']),
        ),
        max_size=8,
    )
)
def test_feed_when_bytes_are_anything_then_only_our_errors_are_raised(pieces: list[bytes]) -> None:
    protocol = QmpProtocol(max_line_bytes=256)

    with contextlib.suppress(CasemateError):
        for piece in pieces:
            protocol.feed(piece)

    assert protocol.open_count == 0


def transcript() -> bytes:
    """A conversation as QEMU has it: greeting, negotiation, answers with nested values, a refusal, events."""
    answers = [
        {"return": {}, "id": 1},
        {"return": [{"bus": 0, "devices": [{"slot": 15, "qdev_id": "rp0"}]}], "id": 2},
        {"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": 3},
    ]
    return GREETING + SHUTDOWN + b"".join(json.dumps(one).encode() + b"\r\n" for one in answers) + SHUTDOWN


changes = st.lists(
    st.tuples(
        st.integers(0, len(transcript()) - 1),
        st.integers(0, 20),
        st.one_of(
            st.binary(max_size=20), st.sampled_from([b"[" * 3000, b'{"a":' * 3000, b"9" * 400, b"\n", b'"'])
        ),
    ),
    min_size=1,
    max_size=4,
)


@given(changes, st.integers(1, 500))
def test_feed_when_a_conversation_is_damaged_then_only_our_errors_and_a_bounded_buffer(
    edits: list[tuple[int, int, bytes]], size: int
) -> None:
    text = transcript()
    for start, removed, put in edits:
        text = text[:start] + put + text[start + removed :]
    protocol = QmpProtocol(max_line_bytes=1024)

    with contextlib.suppress(CasemateError):
        for start in range(0, len(text), size):
            protocol.feed(text[start : start + size])
            assert len(protocol._buffer) <= 1024
            for _ in range(3 - protocol.open_count if protocol.greeting else 0):
                protocol.encode("query-pci")


def test_feed_when_an_answer_is_nested_too_deeply_then_the_conversation_ends() -> None:
    protocol = ready()
    number, _ = protocol.encode("query-pci")
    nested = b"[" * 100_000 + b"]" * 100_000

    with pytest.raises(HypervisorError, match="no QMP"):
        protocol.feed(b'{"id": %d, "return": %s}\n' % (number, nested))


def test_matches_when_data_has_more_then_is_a_match_and_with_less_is_none() -> None:
    assert matches({"device": "a", "path": "/p"}, {"device": "a"})
    assert not matches({"path": "/p"}, {"device": "a"})
    assert not matches({"device": "b"}, {"device": "a"})
    assert matches({}, {})
