from __future__ import annotations

import pytest

from casemate.errors import UnsupportedError
from casemate.guest import cpio
from casemate.guest.initrd import build_initrd, check_agent, modules_list
from casemate.guest.modules import ModulePlan, PlannedModule
from tests.support.guest_files import make_elf

AGENT = make_elf(segments=[(1, b"agent")])
VIRTIO = PlannedModule("virtio", "virtio.ko", "kernel/virtio.ko.xz", ())
PCI = PlannedModule("virtio_pci", "virtio_pci.ko", "kernel/virtio_pci.ko.xz", ("virtio.ko",))
BLK = PlannedModule("virtio_blk", "virtio_blk.ko", "kernel/virtio_blk.ko.xz", ("virtio.ko",))
NET = PlannedModule("virtio_net", "virtio_net.ko", "kernel/virtio_net.ko.xz", ("virtio.ko", "x.ko"))
PLAN = ModulePlan((VIRTIO, PCI), (BLK,), (NET,))


def _members(archive: bytes) -> dict[str, bytes]:
    return {name.decode(): archive[start:end] for name, start, end in cpio.walk(archive)}


def test_build_initrd_holds_agent_nodes_modules_and_lists() -> None:
    found = _members(build_initrd(AGENT, PLAN, lambda path: path.encode()))

    assert found["init"] == AGENT
    assert found["lib/casemate/modules/virtio_pci.ko"] == b"kernel/virtio_pci.ko.xz"
    assert (
        found["lib/casemate/modules.list"]
        == b"virtio.ko -\nvirtio_pci.ko virtio.ko\nvirtio_blk.ko virtio.ko\n"
    )
    assert found["lib/casemate/modules.demand"] == b"virtio_net.ko virtio.ko,x.ko\n"
    assert {"dev/console", "dev/null", "proc", "sys", "run", "tmp", "dev"} <= set(found)


def test_build_initrd_twice_gives_the_same_bytes() -> None:
    assert build_initrd(AGENT, PLAN, str.encode) == build_initrd(AGENT, PLAN, str.encode)


def test_modules_list_of_nothing_is_empty() -> None:
    assert modules_list(()) == ""


@pytest.mark.parametrize(
    ("agent", "reason"),
    [
        (b"#!/bin/sh\n" * 20, "no ELF magic"),
        (b"", "too short"),
        (make_elf(segments=[(1, bytes(500))])[:300], "300 bytes"),
        (make_elf(segments=[(3, b"/lib/ld.so\0")]), "dynamic linker"),
    ],
)
def test_check_agent_that_cannot_be_init_says_why(agent: bytes, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        check_agent(agent, path="/x/agent")
    assert "/x/agent" in str(caught.value)


def test_check_agent_that_is_static_passes() -> None:
    check_agent(AGENT, path="/x/agent")
