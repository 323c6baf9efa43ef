"""Plans carried out with performers that only record: nothing here is a block device or a network interface."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from casemate._async.transaction import AsyncTransaction
from casemate.errors import (
    AgentConnectionError,
    DeadlineExceededError,
    HypervisorError,
    InvalidStateError,
    QmpError,
    VmmExitedError,
)
from casemate.observe import failpoints
from casemate.transaction import Action, GuestCall, NativeCall, Plan, PlanState, QmpCall, Step

NAMES = ("tap.create", "qemu.getfd", "qemu.netdev_add")


class World:
    """Performs by recording; ``faults`` says what fails, by what is done."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.limits: list[float] = []
        self.faults: dict[str, BaseException] = {}
        self.blocked: Callable[[str], Any] | None = None

    async def perform(self, action: Any, results: Mapping[str, Any], limit_s: float) -> str:
        name = getattr(action, "command", "") or getattr(action, "function", "") or action.method
        self.done.append(name)
        self.limits.append(limit_s)
        if self.blocked is not None:
            await self.blocked(name)
        if name in self.faults:
            raise self.faults[name]
        return f"{name} after {len(results)}"

    def performers(self) -> dict[type[Action], Any]:
        return {QmpCall: self.perform, NativeCall: self.perform, GuestCall: self.perform}


def plan(*, check: bool = True, final: bool = False) -> Plan:
    steps = [
        Step(
            name=NAMES[0], action=NativeCall(function="n1"), limit_s=1, undo=(NativeCall(function="n1.undo"),)
        ),
        Step(
            name=NAMES[1],
            action=QmpCall(command="q2"),
            limit_s=2,
            undo=(QmpCall(command="q2.undo"), QmpCall(command="q2.undo2")),
            undo_limit_s=20,
        ),
        Step(name=NAMES[2], action=QmpCall(command="q3"), limit_s=3, final=final),
    ]
    if check:
        steps.append(Step(name="guest.there", action=GuestCall(method="g4"), limit_s=4, check=True))
    return Plan(name="change x", steps=tuple(steps))


async def test_run_when_all_is_done_then_in_order_with_results_and_verified() -> None:
    world = World()
    transaction = AsyncTransaction(plan(), world.performers())
    assert transaction.state is PlanState.PLANNED

    results = await transaction.run()

    assert world.done == ["n1", "q2", "q3", "g4"]
    assert world.limits == [1, 2, 3, 4]
    assert results["qemu.netdev_add"] == "q3 after 2"
    assert transaction.state is PlanState.VERIFIED
    with pytest.raises(InvalidStateError, match="ran before"):
        await transaction.run()


async def test_run_when_nothing_is_checked_then_only_applied() -> None:
    transaction = AsyncTransaction(plan(check=False), World().performers())

    await transaction.run()

    assert transaction.state is PlanState.APPLIED


async def test_run_when_a_step_is_refused_then_it_is_not_undone_and_those_before_are_in_reverse() -> None:
    world = World()
    world.faults["q3"] = QmpError("no")
    transaction = AsyncTransaction(plan(), world.performers())

    with pytest.raises(QmpError, match="no"):
        await transaction.run()

    assert world.done == ["n1", "q2", "q3", "q2.undo", "q2.undo2", "n1.undo"]
    assert world.limits[3:] == [20, 20, 1]
    assert (transaction.state, transaction.remains) == (PlanState.ROLLED_BACK, ())


@pytest.mark.parametrize(
    "error", [DeadlineExceededError("late"), HypervisorError("odd"), KeyboardInterrupt()]
)
async def test_run_when_it_is_not_known_whether_a_step_happened_then_it_is_undone(
    error: BaseException,
) -> None:
    world = World()
    world.faults["q2"] = error
    transaction = AsyncTransaction(plan(), world.performers())

    with pytest.raises(type(error)):
        await transaction.run()

    assert world.done == ["n1", "q2", "q2.undo", "q2.undo2", "n1.undo"]


async def test_run_when_the_check_fails_then_everything_is_undone() -> None:
    world = World()
    world.faults["g4"] = DeadlineExceededError("not there")
    transaction = AsyncTransaction(plan(), world.performers())

    with pytest.raises(DeadlineExceededError, match="not there"):
        await transaction.run()

    assert world.done[-3:] == ["q2.undo", "q2.undo2", "n1.undo"]
    assert transaction.state is PlanState.ROLLED_BACK


async def test_run_when_undoing_fails_then_goes_on_and_tells_what_remains() -> None:
    world = World()
    world.faults |= {"q3": QmpError("first"), "q2.undo": QmpError("second")}
    transaction = AsyncTransaction(plan(), world.performers())

    with pytest.raises(ExceptionGroup) as caught:
        await transaction.run()

    first, second = caught.value.exceptions
    assert (str(first), str(second)) == ("first", "second")
    assert first.__notes__ == ["not undone of 'change x': qemu.getfd"]
    assert second.__notes__ == ["while undoing qemu.getfd of: change x"]
    assert world.done[-1] == "n1.undo"
    assert transaction.state is PlanState.BROKEN
    assert [step.name for step in transaction.remains] == ["qemu.getfd"]


async def test_run_when_the_vmm_died_then_what_was_in_it_is_undone_and_the_host_is_still_cleaned() -> None:
    world = World()
    gone = VmmExitedError("gone", status=-9)
    world.faults |= {"q3": gone, "q2.undo": gone}
    transaction = AsyncTransaction(plan(), world.performers())

    with pytest.raises(VmmExitedError):
        await transaction.run()

    assert world.done[-3:] == ["q2.undo", "q2.undo2", "n1.undo"]
    assert transaction.state is PlanState.ROLLED_BACK


async def test_run_when_only_the_agent_is_gone_then_the_vmm_still_has_to_undo() -> None:
    world = World()
    world.faults |= {"q3": QmpError("first"), "q2.undo": AgentConnectionError("not mine to say")}
    transaction = AsyncTransaction(plan(), world.performers())

    with pytest.raises(ExceptionGroup):
        await transaction.run()

    assert transaction.state is PlanState.BROKEN


async def test_run_when_cancelled_then_undone_whole_before_the_cancellation_is_told() -> None:
    world = World()
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def block(name: str) -> None:
        if name in ("q3", "q2.undo"):
            reached.set()
            await go_on.wait()

    world.blocked = block
    transaction = AsyncTransaction(plan(), world.performers())
    task = asyncio.create_task(transaction.run())
    await reached.wait()
    reached.clear()
    task.cancel()
    await reached.wait()
    # A second one, in the midst of undoing.
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()

    with pytest.raises(asyncio.CancelledError):
        await task

    assert world.done[-3:] == ["q2.undo", "q2.undo2", "n1.undo"]
    assert transaction.state is PlanState.ROLLED_BACK


async def test_run_when_each_failpoint_is_hit_then_what_was_done_before_it_is_undone() -> None:
    expected = {
        "tap.create": [],
        "tap.create.after": ["n1.undo"],
        "qemu.getfd": ["n1.undo"],
        "qemu.getfd.after": ["q2.undo", "q2.undo2", "n1.undo"],
        "guest.there.after": ["q2.undo", "q2.undo2", "n1.undo"],
    }
    for point, undone in expected.items():
        world = World()
        transaction = AsyncTransaction(plan(), world.performers())
        with failpoints.armed(f"{point}=error(made to fail)"), pytest.raises(failpoints.POINTS[point]):
            await transaction.run()
        assert [name for name in world.done if "undo" in name] == undone, point


async def test_run_when_the_last_step_is_final_then_nothing_behind_it_can_undo() -> None:
    world = World()
    transaction = AsyncTransaction(plan(check=False, final=True), world.performers())

    with failpoints.armed("qemu.netdev_add.after=error"):
        await transaction.run()

    assert transaction.state is PlanState.APPLIED
