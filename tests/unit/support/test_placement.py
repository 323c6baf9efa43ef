"""Where a test runs."""

from __future__ import annotations

import pytest

from tests.support import capabilities
from tests.support.placement import DEFERRED, OFFERED_BY_LAB, Placement, place


def lacking(*names: str) -> object:
    return lambda name: f"a {name}" if name in names else None


@pytest.mark.parametrize(
    ("needs", "lacks", "in_lab", "expected"),
    [
        ((), ("kvm",), False, Placement(where="here")),
        (("kvm", "root"), (), False, Placement(where="here")),
        (("kvm", "root"), ("kvm",), False, Placement(where="lab", reason=f"{DEFERRED}needs a kvm")),
        (("kvm",), ("kvm",), True, Placement(where="nowhere", reason="needs a kvm")),
        (("root",), ("root",), False, Placement(where="nowhere", reason="needs a root")),
        (
            ("kvm", "cloud_hypervisor"),
            ("kvm", "cloud_hypervisor"),
            False,
            Placement(where="nowhere", reason="needs a kvm, a cloud_hypervisor"),
        ),
    ],
    ids=["nothing", "all here", "lab", "lab lacks it", "host lacks it", "nobody has it"],
)
def test_place_when_machine_lacks_something_then_says_where(
    needs: tuple[str, ...], lacks: tuple[str, ...], in_lab: bool, expected: Placement
) -> None:
    assert place(needs, lacking(*lacks), in_lab=in_lab) == expected  # type: ignore[arg-type]


def test_offered_by_lab_when_compared_then_each_is_a_capability_that_is_probed() -> None:
    assert capabilities.MARKERS.keys() >= OFFERED_BY_LAB
