"""Older state documents are brought up step by step; newer ones are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from casemate.errors import InvalidConfigError
from casemate.hypervisor.pci import Bridge, BridgeKind, Topology
from casemate.persist.migration import STEPS, migrate
from casemate.persist.record import VERSION
from casemate.persist.store import decode_record
from casemate.types import BlockAttachment, NicAttachment
from tests.unit.persist.test_store import record


def renamed_size(document: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: value for key, value in document.items() if key != "cpus"},
        "vcpus": document["cpus"],
    }


def without_accel(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "accel_reason": "unknown"}


def document_before_both_steps() -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(record())
    document["cpus"] = document.pop("vcpus")
    del document["accel_reason"]
    return document | {"version": VERSION - 2}


def test_decode_record_when_two_versions_old_then_each_step_is_applied_in_order() -> None:
    steps = {VERSION - 2: renamed_size, VERSION - 1: without_accel}
    decoded = decode_record(msgspec.json.encode(document_before_both_steps()), "one", steps=steps)
    assert decoded == msgspec.structs.replace(record(), accel_reason="unknown")


def test_decode_record_when_a_step_is_missing_then_refused_by_version() -> None:
    document = msgspec.json.encode(document_before_both_steps())
    with pytest.raises(InvalidConfigError, match=f"one is of version {VERSION - 2}"):
        decode_record(document, "one", steps={VERSION - 1: without_accel})


def test_decode_record_when_a_step_left_out_a_field_then_refused() -> None:
    document = msgspec.json.encode(document_before_both_steps())
    with pytest.raises(InvalidConfigError, match="vcpus|cpus"):
        decode_record(document, "one", steps={VERSION - 2: without_accel, VERSION - 1: without_accel})


def test_decode_record_when_of_this_version_then_no_step_touches_it() -> None:
    document = msgspec.json.encode(record())
    assert decode_record(document, "one", steps={VERSION: renamed_size}) == record()


def test_decode_record_when_newer_then_refused_also_with_steps() -> None:
    document = msgspec.json.encode(msgspec.to_builtins(record()) | {"version": VERSION + 1})
    with pytest.raises(InvalidConfigError, match=f"version {VERSION + 1}.*reads version {VERSION}"):
        decode_record(document, "one", steps={VERSION: renamed_size})


@pytest.mark.parametrize("version", [None, "1", 1.0, True, [1]])
def test_migrate_when_version_is_no_integer_then_refused(version: object) -> None:
    with pytest.raises(InvalidConfigError, match="no version"):
        migrate({"version": version}, version=1, steps={}, name="one")


def test_migrate_then_the_callers_document_stays_as_it_was() -> None:
    document = document_before_both_steps()
    migrate(
        document,
        version=VERSION,
        steps={VERSION - 2: renamed_size, VERSION - 1: without_accel},
        name="one",
    )
    assert document == document_before_both_steps()


VERSION_1 = b"""{"version":1,"id":"s-1","state":"running","created_unix_ns":5,"owner":{"pid":7,"start_time_ticks":8},
"hypervisor":"qemu","machine":"q35","accel":"tcg","accel_reason":"r","vcpus":1,"memory_mib":512,"kernel":"/k",
"kernel_release":"6","initrd":"/i","vmm":{"pid":9,"start_time_ticks":10},"agent_url":"","containers":[]}"""


def test_decode_record_when_of_version_1_then_it_has_no_later_devices() -> None:
    decoded = decode_record(VERSION_1, "one")

    assert (decoded.version, decoded.id, decoded.devices) == (VERSION, "s-1", ())
    assert decoded.topology.bridges == ()


def test_decode_record_when_devices_are_attached_then_they_and_their_places_come_back() -> None:
    topology, place = Topology(bridges=(Bridge(id="rp0", kind=BridgeKind.ROOT_PORT, address="0f"),)).allocate(
        "nic0"
    )
    nic = NicAttachment(id="nic0", mac="02:00:00:00:00:01", tap="cm0", pci_path=place.path, interface="eth0")
    disk = BlockAttachment(id="disk0", path="/d", readonly=True, pci_path="10/00")
    written = msgspec.structs.replace(record(), topology=topology, devices=(nic, disk))

    read = decode_record(msgspec.json.encode(written), "one")

    assert read == written
    assert read.topology.places() == {"nic0": place}


def test_steps_then_they_lead_without_a_gap_to_the_current_version() -> None:
    assert sorted(STEPS) == list(range(VERSION - len(STEPS), VERSION))


def test_decode_record_when_of_version_1_then_it_has_no_keeper() -> None:
    document: dict[str, Any] = msgspec.to_builtins(record())
    del document["keeper"]
    decoded = decode_record(msgspec.json.encode(document | {"version": 1}), "one")
    assert decoded == msgspec.structs.replace(record(), keeper=None)
