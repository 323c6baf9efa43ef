"""How host and agent reach each other."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from casemate.agent.transport import HybridTransport, VsockTransport, choose_host_port, parse_url
from casemate.errors import CasemateError, HostError


def test_url_then_in_the_form_of_the_reference_system() -> None:
    assert HybridTransport(Path("/run/x/vsock.sock")).url == "hvsock:///run/x/vsock.sock:1024"
    assert VsockTransport(77).url == "vsock://77:1024"


def test_listen_when_hybrid_then_calls_come_on_path_and_port(tmp_path: Path) -> None:
    transport = HybridTransport(tmp_path / "v")
    with transport.listen(10241) as listener, socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "v_10241"))
        accepted, address = listener.accept()
        accepted.close()
    assert transport.is_guest(address)
    assert (tmp_path / "v_10241").stat().st_mode & 0o777 == 0o600


def test_listen_when_the_directory_is_missing_then_the_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        HybridTransport(tmp_path / "absent" / "v").listen(1)
    assert caught.value.target.endswith("absent/v_1")


@pytest.mark.parametrize(("address", "known"), [((77, 5), True), ((78, 5), False), ("", False), ((), False)])
def test_is_guest_when_vsock_then_only_its_context_id(address: object, known: bool) -> None:
    assert VsockTransport(77).is_guest(address) is known


def test_choose_host_port_when_called_often_then_no_well_known_port_and_hardly_a_repetition() -> None:
    ports = [choose_host_port() for _ in range(100)]
    assert min(ports) >= 1 << 16
    assert max(ports) < 1 << 25
    assert len(set(ports)) > 95


@pytest.mark.parametrize("url", ["hvsock:///run/x/vsock.sock:1024", "vsock://77:1024"])
def test_parse_url_when_it_was_made_here_then_the_same_comes_back(url: str) -> None:
    assert parse_url(url).url == url


@pytest.mark.parametrize(
    "url",
    ["", "vsock://77", "vsock://77:1025", "vsock://2:1024", "vsock://4294967295:1024", "vsock://x:1024", "hvsock://a:1024",
     "hvsock:///a:b:1024", "remote:///x:1024", "mock:///x:1024", "http://x:1024"],
)  # fmt: skip
def test_parse_url_when_it_is_none_of_ours_then_refused(url: str) -> None:
    with pytest.raises(CasemateError):
        parse_url(url)
