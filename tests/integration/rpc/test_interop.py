"""Our client against other servers of the protocol, and our server against other clients."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from casemate import _core
from casemate.errors import AgentRpcError, DeadlineExceededError, InvalidConfigError
from tests.support.ttrpc_peer import field

# The first test builds the peers.
pytestmark = pytest.mark.timeout(900)

Serve = Callable[[list[str]], str]
SERVICE = "interop.Test"
SIZES = (0, 64, 64 << 10, 1 << 20, (4 << 20) - 64)
DEADLINE_EXCEEDED, INVALID_ARGUMENT, UNIMPLEMENTED = 4, 3, 12


@pytest.fixture(params=["serve-ours", "serve-crate"])
def rust_server(request: pytest.FixtureRequest, rust_peer: Path, serve: Serve) -> str:
    return serve([str(rust_peer), request.param])


@pytest.fixture
def go_server(go_peer: Path, serve: Serve) -> str:
    return serve([str(go_peer), "serve"])


@pytest.fixture
def our_server(rust_peer: Path, serve: Serve) -> str:
    return serve([str(rust_peer), "serve-ours"])


def outcomes(client: list[str], path: str) -> dict[str, tuple[int, str, int]]:
    """What a client says of each case: code, text, bytes. At a deadline the text depends on whose clock rings first: left out."""
    done = subprocess.run([*client, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = map(json.loads, done.stdout.splitlines())
    return {
        one["case"]: (one["code"], "" if one["case"] == "late" else one["text"], one["size"]) for one in told
    }


def expected() -> dict[str, tuple[int, str, int]]:
    """What every client shall see of every server, unknown names and streams apart."""
    echoes = {f"echo_{size}": (0, "", size) for size in SIZES}
    failures = {f"fail_{code}": (code, f"text of {code}", 0) for code in range(1, 17)}
    rest = {
        "late": (DEADLINE_EXCEEDED, "", 0),
        "metadata": (0, "one,two", 0),
        "at_once": (0, "", sum(1000 + number for number in range(32))),
    }
    return echoes | failures | rest


def without(told: dict[str, tuple[int, str, int]], *cases: str) -> dict[str, tuple[int, str, int]]:
    return {case: outcome for case, outcome in told.items() if case not in cases}


def test_our_client_when_the_server_is_rusts_then_every_call_ends_as_it_should(
    rust_peer: Path, rust_server: str
) -> None:
    told = outcomes([str(rust_peer), "check-ours"], rust_server)
    assert without(told, "no_method", "no_service") == expected()
    assert told["no_method"][0] in (UNIMPLEMENTED, INVALID_ARGUMENT)
    assert told["no_service"][0] in (UNIMPLEMENTED, INVALID_ARGUMENT)


@pytest.mark.go
def test_our_client_when_the_server_is_gos_then_every_call_ends_as_it_should(
    rust_peer: Path, go_server: str
) -> None:
    told = outcomes([str(rust_peer), "check-ours"], go_server)
    assert without(told, "no_method", "no_service") == expected()
    assert (told["no_method"][0], told["no_service"][0]) == (UNIMPLEMENTED, UNIMPLEMENTED)


def test_our_server_when_the_client_is_the_crates_then_every_call_ends_as_it_should(
    rust_peer: Path, our_server: str
) -> None:
    told = outcomes([str(rust_peer), "check-crate"], our_server)
    assert without(told, "no_method", "no_service") == expected()
    assert told["no_method"] == (UNIMPLEMENTED, "Nope method", 0)
    assert told["no_service"] == (INVALID_ARGUMENT, "interop.Nope service does not exist", 0)


@pytest.mark.go
def test_our_server_when_the_client_is_gos_then_every_call_ends_as_it_should_and_a_stream_is_refused(
    go_peer: Path, our_server: str
) -> None:
    told = outcomes([str(go_peer), "check"], our_server)
    assert without(told, "no_method", "no_service", "stream") == expected()
    assert told["no_method"] == (UNIMPLEMENTED, "Nope method", 0)
    assert told["no_service"] == (INVALID_ARGUMENT, "interop.Nope service does not exist", 0)
    assert told["stream"][0] == UNIMPLEMENTED


def python_client(path: str) -> _core.Connection:
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(path)
    return _core.Connection(connected.detach())


def check_python_client(path: str) -> None:
    client = python_client(path)
    for size in SIZES:
        message = field(1, bytes(size)) if size else b""
        assert client.call_raw(SERVICE, "Echo", message) == message
    with pytest.raises(AgentRpcError) as refused:
        client.call_raw(SERVICE, "Fail", field(1, b"5 no such thing"))
    assert (refused.value.code, refused.value.details) == (5, "no such thing")
    with pytest.raises(DeadlineExceededError):
        client.call_raw(SERVICE, "Slow", b"", 0.2)
    with pytest.raises(InvalidConfigError):
        client.call_raw(SERVICE, "Echo", bytes(4 << 20))
    slots = {client.submit_raw(SERVICE, "Echo", field(1, b"%d" % number)): number for number in range(32)}
    assert [client.wait(slot) for slot in reversed(slots)] == [
        field(1, b"%d" % number) for number in reversed(slots.values())
    ]
    client.close()


def test_python_client_when_the_server_is_rusts_then_calls_end_as_they_should(rust_server: str) -> None:
    check_python_client(rust_server)


@pytest.mark.go
def test_python_client_when_the_server_is_gos_then_calls_end_as_they_should(go_server: str) -> None:
    check_python_client(go_server)
