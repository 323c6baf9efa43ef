"""The grammar of failpoints, and that the registry and the source name the same points."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import casemate
from casemate.config.sandbox import TimeoutConfig
from casemate.config.settings import Settings
from casemate.errors import HostError, HypervisorError, InvalidConfigError
from casemate.hypervisor import BlockDevice, NicDevice
from casemate.hypervisor.pci import Place
from casemate.hypervisor.qemu.hotplug import plan_attach, plan_detach
from casemate.observe import failpoints
from casemate.transaction import Step

PACKAGE = Path(casemate.__file__).parent
ROOT = Path(__file__).resolve().parents[3]
NATIVE = sorted(name for name in failpoints.POINTS if name.startswith("native."))


def native_hits(source: str) -> set[str]:
    return set(re.findall(r'\bhit\("(native\.[a-z_]+)"\)', source))


PLACE = Place(bridge="rp0", slot=0, path="0f/00")


def steps_of_plans() -> Iterator[Step]:
    disk = BlockDevice(id="disk0", path="/d", serial="disk0")
    nic = NicDevice(id="nic0", mac="02:00:00:00:00:01")
    for device in (disk, nic):
        for make in (plan_attach, plan_detach):
            yield from make(device, PLACE, TimeoutConfig(), check=True).steps


def test_registry_when_compared_with_the_source_then_each_point_is_passed_somewhere_and_no_other() -> None:
    passed: set[str] = set()
    for tree in ("_async", "images", "keeper", "persist"):
        for path in (PACKAGE / tree).rglob("*.py"):
            passed |= set(re.findall(r'failpoints\.hit[(,]\s*"([^"]+)"', path.read_text()))
    for path in ROOT.glob("rust/casemate-*/src/**/*.rs"):
        # The crate of the points passes them in its own tests.
        passed |= set() if "casemate-failpoint" in path.parts else native_hits(path.read_text())
    for step in steps_of_plans():
        passed |= {step.name} if step.final else {step.name, f"{step.name}.after"}
    assert passed == set(failpoints.POINTS)


def test_registry_when_compared_with_the_native_list_then_the_same_points() -> None:
    listed = re.search(
        r"const POINTS[^=]*= \[([^\]]*)\]", (ROOT / "rust/casemate-failpoint/src/lib.rs").read_text()
    )
    assert listed is not None
    assert sorted(re.findall(r'"([^"]+)"', listed[1])) == NATIVE


def test_hit_when_nothing_is_set_then_nothing_happens() -> None:
    for name in failpoints.POINTS:
        failpoints.hit(name)


def test_hit_when_terms_are_counted_then_each_serves_its_hits_and_then_nothing_happens() -> None:
    outcomes = []
    with failpoints.armed("store.write=1*off->2*error(full: 3*4)") as hits:
        for _ in range(5):
            try:
                failpoints.hit("store.write")
                outcomes.append("")
            except HostError as error:
                outcomes.append(str(error))
        assert hits("store.write") == 5
    assert outcomes == ["", "full: 3*4", "full: 3*4", "", ""]
    failpoints.hit("store.write")


def test_hit_when_a_term_has_no_count_then_it_holds() -> None:
    with failpoints.armed(" qemu.quit = 1*off -> error ; store.write=off"):
        failpoints.hit("qemu.quit")
        failpoints.hit("store.write")
        for _ in range(3):
            with pytest.raises(HypervisorError, match="failpoint qemu.quit"):
                failpoints.hit("qemu.quit")


def test_hit_when_delayed_then_it_waits() -> None:
    with failpoints.armed("store.write=delay(30)"):
        started = time.monotonic()
        failpoints.hit("store.write")
        assert time.monotonic() - started >= 0.03


def test_hit_when_cancelled_in_a_thread_then_as_by_ctrl_c() -> None:
    with failpoints.armed("store.write=cancel"), pytest.raises(KeyboardInterrupt):
        failpoints.hit("store.write")


async def test_hit_when_cancelled_in_a_task_then_as_a_cancelled_wait() -> None:
    with failpoints.armed("store.write=cancel"), pytest.raises(asyncio.CancelledError):
        failpoints.hit("store.write")


def test_calling_when_hit_twice_then_called_once() -> None:
    calls: list[str] = []
    with failpoints.calling("store.write", lambda: calls.append("called")) as hits:
        failpoints.hit("store.write")
        failpoints.hit("store.write")
        assert hits("store.write") == 2
    assert calls == ["called"]


@pytest.mark.parametrize(
    "text",
    [
        "store.write",
        "store.write=",
        "store.write=explode",
        "store.write=error(open",
        "store.write=delay(soon)",
        "store.write=delay",
        "store.write=off(1)",
        "store.write=1*",
        "store.write=x*off",
        "store.write=off->",
        "native.recv=cancel",
    ],
)
def test_armed_when_a_term_makes_no_sense_then_told_what_is_expected(text: str) -> None:
    with pytest.raises(InvalidConfigError, match="expected|not closed") as caught, failpoints.armed(text):
        pass
    assert caught.value.path == "CASEMATE_FAILPOINTS"


def test_armed_when_the_name_is_unknown_then_told_which_there_are() -> None:
    with (
        pytest.raises(InvalidConfigError, match=r"no failpoint 'store\.wright'.*store\.write") as caught,
        failpoints.armed("store.wright=off"),
    ):
        pass
    assert caught.value.path == "CASEMATE_FAILPOINTS"


def test_settings_when_the_environment_names_failpoints_then_they_have_them() -> None:
    assert Settings.from_environment({"CASEMATE_FAILPOINTS": "store.write=off"}).failpoints == (
        "store.write=off"
    )
    assert Settings.from_environment({}).failpoints == ""
