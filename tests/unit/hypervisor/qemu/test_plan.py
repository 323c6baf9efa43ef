from __future__ import annotations

from typing import Any

import pytest

from casemate.config.sandbox import SandboxConfig
from casemate.errors import InvalidConfigError, ResourceExhaustedError, UnsupportedError
from casemate.hypervisor import BlockDevice, GuestAssets
from casemate.hypervisor.qemu import plan as planning
from casemate.hypervisor.qemu.accel import Accelerator
from casemate.hypervisor.qemu.plan import VmPlan, VsockChoice, make_plan

TCG = Accelerator(name="tcg", reason="for the test")
KVM = Accelerator(name="kvm", reason="for the test")
ASSETS = GuestAssets(kernel="/k", initrd="/i")


def disk(name: str = "c1", **changes: Any) -> BlockDevice:
    return BlockDevice(**{"id": name, "path": f"/{name}.erofs", "serial": name, **changes})


def plan(config: SandboxConfig | None = None, **changes: Any) -> VmPlan:
    arguments: dict[str, Any] = {
        "sandbox_id": "s1",
        "uuid": "u",
        "qemu": "/q",
        "accelerator": TCG,
        "assets": ASSETS,
        "vsock": VsockChoice(kind="vhost-user"),
    }
    return make_plan(config or SandboxConfig(), **{**arguments, **changes})


def test_plan_when_q35_then_disks_have_the_pci_paths_of_their_slots() -> None:
    made = plan(disks=[disk("c1"), disk("c2")])

    assert [address.pci_path for address in made.disks] == ["03", "04"]
    assert [(d.bus, d.slot) for d in made.devices if d.id.startswith("virtio-c")] == [
        ("pcie.0", 3),
        ("pcie.0", 4),
    ]


def test_plan_when_microvm_then_disks_are_known_by_serial_and_nothing_is_on_pci() -> None:
    made = plan(SandboxConfig(machine="microvm"), disks=[disk("c1")])

    assert [(address.pci_path, address.serial) for address in made.disks] == [(None, "c1")]
    assert all(device.bus is None for device in made.devices)
    assert made.topology.capacity == 0


def test_plan_when_guest_boots_from_an_image_then_it_is_the_first_disk_and_not_among_the_callers() -> None:
    made = plan(assets=GuestAssets(kernel="/k", image="/d.img"), disks=[disk("c1")])

    assert [node.name for node in made.nodes] == ["drive-image", "drive-c1"]
    assert [(address.id, address.pci_path) for address in made.disks] == [("c1", "04")]


@pytest.mark.parametrize(
    ("vsock", "fds", "shared"),
    [
        (VsockChoice(kind="none"), {"qmp": 3, "console": 4}, False),
        (VsockChoice(kind="vhost", guest_cid=77), {"qmp": 3, "console": 4, "vsock": 5}, False),
        (VsockChoice(kind="vhost-user"), {"qmp": 3, "console": 4, "vsock": 5}, True),
        (VsockChoice(kind="vhost-user", path="/v.sock"), {"qmp": 3, "console": 4}, True),
    ],
)
def test_plan_when_vsock_is_served_so_then_memory_is_shared_only_where_a_back_end_maps_it(
    vsock: VsockChoice, fds: dict[str, int], shared: bool
) -> None:
    made = plan(vsock=vsock)

    assert made.fds == fds
    assert (made.memory is not None) is shared
    assert (("memory-backend", "mem0") in made.machine_options) is shared


def test_plan_when_no_slots_overlap_then_every_device_of_the_root_bus_has_its_own() -> None:
    made = plan(SandboxConfig(hotplug_ports=16), disks=[disk(f"c{i}") for i in range(12)])

    slots = [device.slot for device in made.devices]

    assert len(slots) == len(set(slots))
    assert None not in slots
    assert {0, 31}.isdisjoint(slots)


@pytest.mark.parametrize(("machine", "room"), [("q35", 12), ("microvm", 6)])
def test_plan_when_disks_exceed_the_slots_then_says_how_many_fit(machine: str, room: int) -> None:
    disks = [disk(f"c{i}") for i in range(room + 1)]

    assert len(plan(SandboxConfig(machine=machine), disks=disks[:room]).disks) == room
    with pytest.raises(ResourceExhaustedError, match=f"room for {room}"):
        plan(SandboxConfig(machine=machine), disks=disks)


@pytest.mark.parametrize(
    "changes",
    [
        {"path": ""},
        {"id": "c" * 32},
        {"id": "1c"},
        {"id": "a/b"},
        {"id": ""},
        {"serial": "s" * 21},
        {"serial": ""},
        {"serial": "é" * 11},
    ],
)
def test_plan_when_a_disk_is_unusable_then_raises(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        plan(disks=[disk(**{"name": "c1", **changes})] if "name" in changes else [disk("c1", **changes)])

    assert caught.value.path == "disks"


def test_plan_when_two_disks_share_an_id_then_raises() -> None:
    with pytest.raises(InvalidConfigError, match="two disks"):
        plan(disks=[disk("c1"), disk("c1")])


@pytest.mark.parametrize(
    "assets",
    [
        GuestAssets(kernel="/k"),
        GuestAssets(kernel="/k", initrd="/i", image="/d"),
        GuestAssets(kernel="", initrd="/i"),
    ],
)
def test_plan_when_assets_do_not_fit_together_then_raises(assets: GuestAssets) -> None:
    with pytest.raises(InvalidConfigError):
        plan(assets=assets)


@pytest.mark.parametrize(
    ("accelerator", "count", "fits"),
    [(TCG, 255, True), (TCG, 256, False), (KVM, 256, True), (KVM, 288, True)],
)
def test_plan_when_vcpus_exceed_the_accelerator_then_names_the_range(
    accelerator: Accelerator, count: int, fits: bool
) -> None:
    config = SandboxConfig(vcpus=1, max_vcpus=count)

    if fits:
        assert plan(config, accelerator=accelerator).max_vcpus == count
    else:
        with pytest.raises(InvalidConfigError, match="1 to 255 vCPUs") as caught:
            plan(config, accelerator=accelerator)
        assert caught.value.path == "max_vcpus"


def test_plan_when_cpu_host_is_asked_for_without_kvm_then_says_so() -> None:
    with pytest.raises(UnsupportedError, match="use 'max'") as caught:
        plan(SandboxConfig(cpu_model="host,-avx"))

    assert caught.value.capability == "kvm"
    assert plan(SandboxConfig(cpu_model="host,-avx"), accelerator=KVM).cpu == "host,-avx"


@pytest.mark.parametrize("cid", [0, 2, 2**32 - 1, 2**32])
def test_plan_when_context_id_is_reserved_then_raises(cid: int) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        plan(vsock=VsockChoice(kind="vhost", guest_cid=cid))

    assert caught.value.path == "vsock.guest_cid"


def test_plan_when_uuid_is_empty_then_raises() -> None:
    with pytest.raises(InvalidConfigError) as caught:
        plan(uuid="")

    assert caught.value.path == "uuid"


def test_topology_when_q35_then_each_port_is_where_its_device_says() -> None:
    made = plan(SandboxConfig(hotplug_ports=16))

    topology, paths = made.topology, []
    for number in range(16):
        topology, place = topology.allocate(f"d{number}")
        port = next(device for device in made.devices if device.id == place.bridge)
        assert place.path == f"{port.slot:02x}/00"
        paths.append(place.path)

    assert (paths[0], paths[15]) == ("0f/00", "1e/00")
    assert topology.free_count == 0


def test_topology_when_bridges_are_asked_for_then_behind_ports_of_their_own_and_filled_last() -> None:
    made = plan(SandboxConfig(hotplug_ports=1, hotplug_bridges=2))
    later = [(device.id, device.driver, device.bus, device.slot) for device in made.devices[:5]]

    topology, paths = made.topology, []
    for number in range(61):
        topology, place = topology.allocate(f"d{number}")
        paths.append(place.path)

    assert later == [
        ("rp0", "pcie-root-port", "pcie.0", 0x0F),
        ("rpbr0", "pcie-root-port", "pcie.0", 0x10),
        ("br0", "pcie-pci-bridge", "rpbr0", 0),
        ("rpbr1", "pcie-root-port", "pcie.0", 0x11),
        ("br1", "pcie-pci-bridge", "rpbr1", 0),
    ]
    assert (paths[0], paths[1], paths[30], paths[31], paths[60]) == (
        "0f/00",
        "10/00/01",
        "10/00/1e",
        "11/00/01",
        "11/00/1e",
    )
    assert topology.free_count == 0


def test_capabilities_when_microvm_then_nothing_is_hot_plugged() -> None:
    microvm = planning.capabilities("microvm", "kvm")
    q35 = planning.capabilities("q35", "tcg")

    assert not (microvm.block_hotplug or microvm.vcpu_hotplug or microvm.memory_hotplug or microvm.pci)
    assert q35.block_hotplug
    assert (q35.network_hotplug, microvm.network_hotplug) == (True, False)
    assert (microvm.max_vcpus, q35.max_vcpus) == (288, 255)
