"""Peers of the interoperability tests, built once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casemate.bench import peers

BUILD_LIMIT_S = 900.0


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "casemate-tests"


@pytest.fixture(scope="session")
def rust_peer() -> Path:
    """The program with our parts in Rust and the crate ttrpc."""
    absent: dict[str, str] = {}
    program = peers.build_rust(cache(), absent)
    assert program is not None, absent
    return program


@pytest.fixture(scope="session")
def go_peer() -> Path:
    """The program with Go's ttrpc."""
    absent: dict[str, str] = {}
    program = peers.build_go(cache(), absent)
    assert program is not None, absent
    return program


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[list[str]], str]]:
    """Start a server from its command without the path; gives the path of its socket."""
    started = []

    def start(command: list[str]) -> str:
        path = str(tmp_path / "peer.sock")
        process = subprocess.Popen([*command, path], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return path

    yield start
    for process in started:
        process.kill()
        process.communicate()
