from __future__ import annotations

from pathlib import Path

import pytest

from casemate.host import devices


def status(root: Path, capabilities: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")
    return root


@pytest.mark.parametrize(
    ("mask", "held"), [("0000000000001000", True), ("000001ffffffffff", True), ("0000000000000800", False)]
)
def test_capability_then_is_a_bit_of_the_effective_set(mask: str, held: bool, tmp_path: Path) -> None:
    assert devices.has_capability(12, status(tmp_path, mask)) is held


def test_capability_when_proc_is_missing_then_is_not_held(tmp_path: Path) -> None:
    assert not devices.has_capability(12, tmp_path)


def test_vsock_when_kernel_serves_none_then_we_do_and_the_reason_is_told(tmp_path: Path) -> None:
    found = devices.find_vsock(str(tmp_path / "vhost-vsock"))

    assert (found.state, found.facts["kind"]) == ("yes", "vhost-user")
    assert "No such file" in found.text
    assert found.cure


def test_vsock_when_device_is_no_device_then_we_serve_it(tmp_path: Path) -> None:
    (tmp_path / "vhost-vsock").touch()

    assert devices.find_vsock(str(tmp_path / "vhost-vsock")).facts["kind"] == "vhost-user"


def test_vsock_when_the_settings_choose_then_they_are_followed(tmp_path: Path) -> None:
    absent = str(tmp_path / "vhost-vsock")

    asked_for = devices.find_vsock(absent, wanted="kernel")

    assert (asked_for.state, asked_for.needed) == ("no", True)
    assert asked_for.cure.endswith("or CASEMATE_VSOCK=auto")
    assert devices.find_vsock(absent, wanted="user").state == "yes"


def test_tap_when_device_is_missing_then_no_with_the_cure(tmp_path: Path) -> None:
    found = devices.find_tap(str(tmp_path / "tun"))

    assert (found.state, found.cure) == ("no", "modprobe tun")


def test_tap_when_device_is_none_then_no(tmp_path: Path) -> None:
    (tmp_path / "tun").touch()

    assert devices.find_tap(str(tmp_path / "tun")).state == "no"


@pytest.mark.tun
@pytest.mark.root
@pytest.mark.parametrize(("mask", "state"), [("0000000000001000", "yes"), ("0000000000000000", "no")])
def test_tap_then_needs_device_and_capability(mask: str, state: str, tmp_path: Path) -> None:
    before = Path("/proc/net/dev").read_text().count(":")

    found = devices.find_tap(root=status(tmp_path, mask))

    assert found.state == state
    assert ("CAP_NET_ADMIN" in found.cure) == (state == "no")
    assert Path("/proc/net/dev").read_text().count(":") == before
