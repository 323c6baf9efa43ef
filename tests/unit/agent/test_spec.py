"""The OCI specification and storages that a container gets."""

from __future__ import annotations

import msgspec

from casemate.agent.messages import CreateContainerRequest, User, encode
from casemate.agent.spec import CAPABILITIES, build_process, build_spec, build_storages


def test_build_process_when_root_then_capabilities_are_effective() -> None:
    made = build_process(("sh",), (), "/", User(), terminal=False)
    assert made.capabilities is not None
    assert made.capabilities.effective == CAPABILITIES


def test_build_process_when_not_root_then_no_capability_is_effective() -> None:
    made = build_process(("sh",), (), "/", User(uid=1000), terminal=False)
    assert made.capabilities is not None
    assert (made.capabilities.effective, made.capabilities.permitted) == ((), ())
    assert made.capabilities.bounding == CAPABILITIES


def test_build_process_when_terminal_then_term_is_set_unless_given() -> None:
    assert "TERM=xterm" in build_process(("sh",), ("A=b",), "/", User(), terminal=True).env
    assert build_process(("sh",), ("TERM=vt100",), "/", User(), terminal=True).env == ("TERM=vt100",)


def test_build_storages_then_the_overlay_stands_on_the_disk() -> None:
    disk, overlay = build_storages("web", driver="blk", source="05", fstype="erofs")
    assert (disk.driver, disk.source, disk.fstype, disk.options) == ("blk", "05", "erofs", ("ro",))
    assert f"lowerdir={disk.mount_point}" in overlay.options
    assert overlay.mount_point == "/run/kata-containers/web/rootfs"


def test_encode_when_container_request_then_names_are_those_of_the_protocol() -> None:
    made = build_process(("sh", "-c", "x"), ("A=b",), "/w", User(uid=5, gid=6), terminal=True)
    spec = build_spec("web", made, hostname="h", readonly_rootfs=True)
    request = CreateContainerRequest(container_id="web", exec_id="web", spec=spec)
    document = msgspec.json.decode(encode(request))
    oci = document["OCI"]
    assert (document["container_id"], oci["Hostname"], oci["Root"]["Readonly"]) == ("web", "h", True)
    assert oci["Process"]["User"] == {"UID": 5, "GID": 6}
    assert oci["Process"]["Args"] == ["sh", "-c", "x"]
    assert oci["Mounts"][0]["destination"] == "/proc"
    assert {one["Type"] for one in oci["Linux"]["Namespaces"]} == {"pid", "ipc", "uts", "mount", "cgroup"}
    assert oci["Process"]["Rlimits"][0] == {"Type": "RLIMIT_NOFILE", "Hard": 1048576, "Soft": 1048576}
