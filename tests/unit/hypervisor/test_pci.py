from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from casemate.errors import AlreadyExistsError, InvalidConfigError, NotFoundError, ResourceExhaustedError
from casemate.hypervisor.index import MAX_INDEX, lowest_free
from casemate.hypervisor.pci import Bridge, BridgeKind, PciAddress, PciPath, Place, Topology

addresses = st.builds(PciAddress, st.integers(0, 31), st.integers(0, 7))


def ports(count: int) -> tuple[Bridge, ...]:
    return tuple(
        Bridge(id=f"rp{i}", kind=BridgeKind.ROOT_PORT, address=f"{15 + i:02x}") for i in range(count)
    )


def nested(index: int) -> tuple[Bridge, Bridge]:
    port = Bridge(id=f"rp-br{index}", kind=BridgeKind.ROOT_PORT, address=f"{2 + index:02x}", open=False)
    bridge = Bridge(id=f"br{index}", kind=BridgeKind.PCIE_BRIDGE, address="00", parent=port.id)
    return port, bridge


@pytest.mark.parametrize(
    ("text", "slot", "function", "shown"),
    [
        ("00", 0, 0, "00"),
        ("1f", 31, 0, "1f"),
        ("0000A", 10, 0, "0a"),
        ("f", 15, 0, "0f"),
        ("0f.7", 15, 7, "0f.7"),
    ],
)
def test_slot_when_text_is_right_then_is_read(text: str, slot: int, function: int, shown: str) -> None:
    address = PciAddress.parse(text)

    assert (address.slot, address.function, str(address)) == (slot, function, shown)


@pytest.mark.parametrize(
    "text", ["", "20", "-1", "+1", "0x1", "g", " 1", "1 ", "1.", ".1", "1.8", "1.2.3", "1_0", "١"]
)
def test_slot_when_text_is_wrong_then_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        PciAddress.parse(text)

    assert caught.value.path in ("slot", "function")


@pytest.mark.parametrize("slot", [-1, 32])
def test_slot_when_number_is_out_of_range_then_is_refused(slot: int) -> None:
    with pytest.raises(InvalidConfigError, match="0 to 31"):
        PciAddress(slot)


def test_path_when_written_or_empty_then_reads_the_same() -> None:
    assert str(PciPath.parse("02/1f")) == "02/1f" == str(PciPath.of_slots(2, 31))
    assert PciPath.parse("") == PciPath()
    assert str(PciPath()) == ""


@pytest.mark.parametrize("text", ["/", "02/", "/02", "02//1f", "02/20"])
def test_path_when_a_part_is_empty_or_wrong_then_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfigError):
        PciPath.parse(text)


def test_path_when_of_no_slots_then_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="at least one slot"):
        PciPath.of_slots()


@given(st.lists(addresses).map(lambda parts: PciPath(tuple(parts))))
def test_path_when_written_and_read_then_is_the_same(path: PciPath) -> None:
    assert PciPath.parse(str(path)) == path


@given(st.text(max_size=12))
def test_path_when_text_is_anything_then_is_read_or_refused(text: str) -> None:
    try:
        path = PciPath.parse(text)
    except InvalidConfigError:
        return
    assert PciPath.parse(str(path)) == path


@pytest.mark.parametrize(
    ("kind", "capacity", "first"),
    [(BridgeKind.ROOT_PORT, 1, 0), (BridgeKind.PCIE_BRIDGE, 30, 1), (BridgeKind.PCI_BRIDGE, 30, 1)],
)
def test_bridge_when_filled_then_lowest_slot_first_until_none_is_empty(
    kind: BridgeKind, capacity: int, first: int
) -> None:
    bridge = Bridge(id="b", kind=kind, address="02")

    taken = []
    for number in range(capacity):
        bridge, slot = bridge.with_device(f"d{number}")
        taken.append(slot)

    assert taken == list(range(first, first + capacity))
    assert bridge.capacity == capacity
    with pytest.raises(ResourceExhaustedError, match="no empty slot"):
        bridge.with_device("more")


def test_bridge_when_device_is_taken_away_then_its_slot_comes_first_again() -> None:
    bridge = Bridge(id="b", kind=BridgeKind.PCIE_BRIDGE, address="02")
    for number in range(3):
        bridge, _ = bridge.with_device(f"d{number}")

    bridge, slot = bridge.without_device("d1").with_device("d3")

    assert slot == 2
    with pytest.raises(NotFoundError, match="'d1' is not behind bridge b"):
        bridge.without_device("d1")


def test_allocate_when_first_bridge_is_full_then_next_one_until_there_is_no_room() -> None:
    topology = Topology(bridges=(*nested(0), *nested(1)))

    places = []
    for number in range(60):
        topology, place = topology.allocate(f"d{number}")
        places.append(place)

    assert places[0] == Place(bridge="br0", slot=1, path="02/00/01")
    assert places[29].path == "02/00/1e"
    assert places[30] == Place(bridge="br1", slot=1, path="03/00/01")
    assert (topology.capacity, topology.free_count) == (60, 0)
    with pytest.raises(ResourceExhaustedError, match="no more bridge slots: all 60"):
        topology.allocate("more")


def test_allocate_when_name_is_taken_then_is_refused() -> None:
    topology, _ = Topology(bridges=ports(2)).allocate("a")

    with pytest.raises(AlreadyExistsError):
        topology.allocate("a")


def test_release_when_there_is_none_then_names_those_there_are() -> None:
    topology, _ = Topology(bridges=ports(2)).allocate("a")

    with pytest.raises(NotFoundError, match="there are: a"):
        topology.release("b")


def test_path_of_when_function_is_not_0_then_it_is_in_the_path() -> None:
    port = Bridge(id="rp9", kind=BridgeKind.ROOT_PORT, address="10.1")

    _, place = Topology(bridges=(port,)).allocate("d")

    assert place.path == "10.1/00"
    with pytest.raises(NotFoundError, match="no bridge 'x'"):
        Topology().path_of("x")


class AnyTopology(RuleBasedStateMachine):
    """A topology against a dictionary of what has a place."""

    def __init__(self) -> None:
        super().__init__()
        self.topology = Topology(bridges=(*ports(3), *nested(0)))
        self.known: dict[str, Place] = {}

    @rule(name=st.sampled_from([f"d{number}" for number in range(40)]))
    def allocate(self, name: str) -> None:
        before = self.topology
        try:
            self.topology, place = before.allocate(name)
        except AlreadyExistsError:
            assert name in self.known
            return
        except ResourceExhaustedError:
            assert len(self.known) == before.capacity
            return
        assert place not in self.known.values()
        assert self.topology.release(name) == before
        self.known[name] = place

    @rule(name=st.sampled_from([f"d{number}" for number in range(40)]))
    def release(self, name: str) -> None:
        before = self.topology
        try:
            self.topology = before.release(name)
        except NotFoundError:
            assert name not in self.known
            return
        del self.known[name]

    @invariant()
    def is_the_model(self) -> None:
        assert self.topology.places() == self.known
        assert len(set(self.known.values())) == len(self.known)
        assert self.topology.free_count == self.topology.capacity - len(self.known)

    @invariant()
    def survives_writing_and_reading(self) -> None:
        text = msgspec.json.encode(self.topology)
        assert msgspec.json.decode(text, type=Topology) == self.topology


TestAnyTopology: Any = AnyTopology.TestCase


def test_lowest_free_when_some_are_taken_then_first_gap_and_all_taken_is_an_error() -> None:
    taken = {"disk0", "disk1", "disk2"}

    assert lowest_free(taken, "disk") == "disk3"
    assert lowest_free(taken - {"disk1"}, "disk") == "disk1"
    with pytest.raises(ResourceExhaustedError, match="65535 names"):
        lowest_free({f"disk{number}" for number in range(MAX_INDEX + 1)}, "disk")
