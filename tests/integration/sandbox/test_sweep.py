"""Each step of each operation fails in each way, on a fake VMM; afterwards the host is as before.

The steps are those that an operation passes, so a point that is added to the list is swept without further words. The ways:
an error, a delay, an interruption (of a thread, of a task), the VMM's death, the owner's death.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casemate import AsyncSandbox, Sandbox
from casemate.observe import failpoints
from tests.integration.sandbox.life import attach_and_detach, live, make_and_remove, start, use_everything
from tests.support.fake_vm import FakeVm
from tests.support.sweep import Step, kill_vmm, leaving_nothing, steps_of, vmm_pids

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

NAME = "swept"
# An end that goes well passes them by chance, when the VMM was just ending: they are swept with an end that goes wrong.
ONLY_ON_FAILURE = ("qemu.killed",)
SWEPT: dict[str, set[str]] = {}
COUNTS: dict[str, int] = {}
# Five ways for a start, four for an end, four each for three operations, and the owner's death.
ALL_SWEEPS = 22


@pytest.fixture(scope="module", autouse=True)
def _whole_sweep(request: pytest.FixtureRequest) -> Iterator[None]:
    """When all was swept: how much that was, and whether a point of the list was missed."""
    yield
    if len(COUNTS) < ALL_SWEEPS:
        return
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    assert reporter is not None
    reporter.write_line(f"\nfailpoints: {sum(COUNTS.values())} cases at {len(failpoints.POINTS)} points")
    for key in sorted(COUNTS):
        reporter.write_line(f"  {key}: {COUNTS[key]} steps")
    missed = set(failpoints.POINTS) - set().union(*SWEPT.values())
    assert missed == set()


def outcome_of(call: Callable[[], object]) -> list[BaseException]:
    """What a call raised: nothing, one error, or those of a group."""
    try:
        call()
    except BaseExceptionGroup as group:
        return [error.with_traceback(None) for error in group.exceptions]
    except BaseException as error:
        return [error.with_traceback(None)]
    return []


def told(errors: list[BaseException], text: str = "") -> list[tuple[str, bool]]:
    """Class names of the errors, and whether the text is theirs. The errors themselves would hold what was made."""
    return [(type(error).__name__, text in str(error)) for error in errors]


def kill(name: str) -> None:
    assert kill_vmm(name)


def count(operation: str, steps: tuple[Step, ...], kind: str) -> None:
    SWEPT.setdefault(operation, set()).update(step.name for step in steps)
    COUNTS[f"{operation}, {kind}"] = len(steps)


def clear(sandbox: Sandbox) -> None:
    """What a failed operation left to its caller, who is told of it by the sandbox's own lists."""
    for container in sandbox.containers:
        if container.id == "second":
            container.remove()
    for attachment in sandbox.attachments:
        sandbox.detach(attachment)
    main = sandbox.container("main")
    if main.state.value == "paused":
        main.resume()


def check_usable(sandbox: Sandbox, step: object) -> None:
    """It serves on, and the guest runs nothing that nobody knows."""
    main = sandbox.container("main")
    assert main.exec(["echo", "on"], capture=True).stdout == "on\n", step
    stats = main.stats()
    assert stats.pids_stats is not None
    assert stats.pids_stats.current == 1, f"{step}: a process was left in the guest"
    assert [one.id for one in sandbox.containers] == ["main"], step
    assert sandbox.attachments == (), step
    assert len(sandbox.inspect().containers) == 1


@contextmanager
def running(fake_vm: FakeVm) -> Iterator[Sandbox]:
    sandbox = start(fake_vm, NAME)
    try:
        yield sandbox
    finally:
        sandbox.stop()


def steps_of_create(fake_vm: FakeVm) -> tuple[Step, ...]:
    made: list[Sandbox] = []
    steps = steps_of(lambda: made.append(start(fake_vm, NAME)))
    made[0].stop()
    return steps


def steps_of_stop(fake_vm: FakeVm) -> tuple[Step, ...]:
    return tuple(step for step in steps_of(start(fake_vm, NAME).stop) if step.name not in ONLY_ON_FAILURE)


@pytest.mark.parametrize(("action", "kind"), [("error(made to fail)", "error"), ("cancel", "Ctrl-C")])
def test_create_when_any_step_fails_then_its_error_is_raised_and_nothing_stays(
    fake_vm: FakeVm, action: str, kind: str
) -> None:
    steps = steps_of_create(fake_vm)
    for step in steps:
        wanted = failpoints.POINTS[step.name].__name__ if kind == "error" else "KeyboardInterrupt"
        with leaving_nothing(fake_vm.settings, step), step.armed(action):
            assert told(outcome_of(lambda: start(fake_vm, NAME)))[0][0] == wanted, step
        assert vmm_pids(NAME) == []
    count("create", steps, kind)


async def test_create_when_cancelled_at_any_step_then_nothing_stays(fake_vm: FakeVm) -> None:
    await asyncio.gather(*(asyncio.to_thread(os.getpid) for _ in range(64)))
    steps = await asyncio.to_thread(steps_of_create, fake_vm)

    async def is_cancelled() -> bool:
        work = AsyncSandbox.create(
            fake_vm.config(NAME, hotplug_ports=1),
            containers=(fake_vm.container(),),
            start=True,
            settings=fake_vm.settings,
        )
        task = asyncio.create_task(work)
        await asyncio.wait([task])
        return task.cancelled()

    for step in steps:
        with leaving_nothing(fake_vm.settings, step), step.armed("cancel"):
            assert await is_cancelled(), step
    count("create", steps, "cancel")


def start_slowly(fake_vm: FakeVm, step: Step) -> None:
    with step.armed("delay(20)"), start(fake_vm, NAME) as sandbox:
        check_usable(sandbox, step)


def test_create_when_any_step_is_slow_then_it_comes_up(fake_vm: FakeVm) -> None:
    steps = steps_of_create(fake_vm)
    for step in steps:
        with leaving_nothing(fake_vm.settings, step):
            start_slowly(fake_vm, step)
    count("create", steps, "delay")


def start_dying(fake_vm: FakeVm, step: Step) -> tuple[bool, list[tuple[str, bool]]]:
    """Whether there was a VMM to kill, and what was raised."""
    killed: list[bool] = []

    def use() -> None:
        with start(fake_vm, NAME) as sandbox:
            sandbox.container().wait(30 if killed[0] else 0)

    with step.calling(lambda: killed.append(kill_vmm(NAME))):
        errors = told(outcome_of(use), "SIGKILL")
    return killed[0], [error for error in errors if error[0] != "DeadlineExceededError"]


def test_create_when_the_vmm_dies_at_any_step_then_told_and_nothing_stays(fake_vm: FakeVm) -> None:
    steps = steps_of_create(fake_vm)
    for step in steps:
        with leaving_nothing(fake_vm.settings, step):
            killed, errors = start_dying(fake_vm, step)
        # Before there is one nothing dies; later the first wait tells why.
        assert errors == ([("VmmExitedError", True)] if killed else []), step
    count("create", steps, "VMM death")


@pytest.mark.parametrize(
    ("action", "kind"), [("error(made to fail)", "error"), ("cancel", "Ctrl-C"), ("delay(20)", "delay")]
)
def test_stop_when_any_step_fails_then_the_rest_is_done_all_the_same(
    fake_vm: FakeVm, action: str, kind: str
) -> None:
    steps = (*steps_of_stop(fake_vm), *(Step(name, 0) for name in ONLY_ON_FAILURE))
    for step in steps:
        with leaving_nothing(fake_vm.settings, step):
            quits = "qemu.quit=error;" if step.name in ONLY_ON_FAILURE else ""
            # A guest that said goodbye ends its VMM, which then needs no killing.
            fake_vm.script["faults"] = {"DestroySandbox": "refuse"} if quits else {}
            sandbox = start(fake_vm, NAME)
            with failpoints.armed(quits + step.setting(action)) as hits:
                errors = told(outcome_of(sandbox.stop))
                assert hits(step.name) == 1
            # A guest or a VMM that does not say goodbye is no failure of the end.
            tolerated = step.name in ("qemu.quit", "agent.destroy_sandbox") and kind == "error"
            assert bool(errors) == (kind != "delay" and not tolerated), (step, errors)
            assert sandbox.state.value == "stopped"
            assert vmm_pids(NAME) == []
            del sandbox
            # The name is free in any case; the directory is a dead one when it could not be removed.
            left = Sandbox.cleanup(NAME, settings=fake_vm.settings).removed
            assert left == (step.name == "store.remove" and kind != "delay"), step
    count("stop", steps, kind)


def test_stop_when_the_vmm_dies_at_any_step_then_nothing_stays(fake_vm: FakeVm) -> None:
    steps, killed = steps_of_stop(fake_vm), list[bool]()
    for step in steps:
        with leaving_nothing(fake_vm.settings, step):
            sandbox = start(fake_vm, NAME)
            # Its last steps come when it is gone anyway.
            with step.calling(lambda: killed.append(kill_vmm(NAME))):
                assert outcome_of(sandbox.stop) == [], step
            del sandbox
    assert len(killed) == len(steps)
    assert any(killed)
    count("stop", steps, "VMM death")


Operation = Callable[[Sandbox, FakeVm], None]
OPERATIONS: dict[str, Operation] = {
    "exec and streams": lambda sandbox, _: use_everything(sandbox.container("main")),
    "container": make_and_remove,
    "devices": attach_and_detach,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("action", "kind"), [("error(made to fail)", "error"), ("cancel", "Ctrl-C"), ("delay(20)", "delay")]
)
def test_operation_when_any_step_fails_then_told_and_the_sandbox_serves_on(
    fake_vm: FakeVm, operation: str, action: str, kind: str
) -> None:
    run = OPERATIONS[operation]
    with running(fake_vm) as sandbox:
        steps = steps_of(lambda: run(sandbox, fake_vm))
        for step in steps:
            wanted = {
                "error": [failpoints.POINTS[step.name].__name__],
                "Ctrl-C": ["KeyboardInterrupt"],
                "delay": [],
            }[kind]
            with step.armed(action):
                errors = told(outcome_of(lambda: run(sandbox, fake_vm)))
            assert [name for name, _ in errors] == wanted, step
            clear(sandbox)
            check_usable(sandbox, step)
    count(operation, steps, kind)


# The guest's requests fail by it or find the connection closed already; the VMM's commands fail by it.
DEATHS = (["VmmExitedError"], ["AgentConnectionError"])


def steps_of_operation(fake_vm: FakeVm, run: Operation) -> tuple[Step, ...]:
    with running(fake_vm) as sandbox:
        return steps_of(lambda: run(sandbox, fake_vm))


def outcome_on_death(fake_vm: FakeVm, run: Operation, step: Step) -> list[str]:
    def use(sandbox: Sandbox) -> None:
        run(sandbox, fake_vm)
        # Behind the last step nothing waits any more: the next request tells.
        sandbox.container("main").exec(["true"], capture=True)

    with running(fake_vm) as sandbox, step.calling(lambda: kill(NAME)):
        return [name for name, _ in told(outcome_of(lambda: use(sandbox)))]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_when_the_vmm_dies_at_any_step_then_told_and_nothing_stays(
    fake_vm: FakeVm, operation: str
) -> None:
    run = OPERATIONS[operation]
    steps = steps_of_operation(fake_vm, run)
    for step in steps:
        with leaving_nothing(fake_vm.settings, step):
            assert outcome_on_death(fake_vm, run, step) in DEATHS, step
    count(operation, steps, "VMM death")


# One interpreter for all owners: each is a fork of it, made before it has done anything.
OWNERS = """
import json, os, sys
from casemate import Sandbox, SandboxConfig, ContainerConfig, Settings
from casemate.observe import failpoints
from tests.integration.sandbox.life import live_in_fork
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        live_in_fork(json.loads(line))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_owner_when_it_dies_at_any_step_then_cleanup_leaves_nothing(fake_vm: FakeVm) -> None:
    steps = tuple(step for step in steps_of(lambda: live(fake_vm, NAME)) if step.name not in ONLY_ON_FAILURE)
    with subprocess.Popen(
        [sys.executable, "-c", OWNERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owners:
        assert owners.stdin is not None
        assert owners.stdout is not None
        for step in steps:
            document = {
                "setting": step.setting("kill"),
                "state_root": str(fake_vm.settings.state_root),
                "cache_root": str(fake_vm.settings.cache_root),
                "directory": str(fake_vm.qemu.parent),
                "log": str(fake_vm.log),
                "name": NAME,
            }
            owners.stdin.write(json.dumps(document) + "\n")
            owners.stdin.flush()
            assert owners.stdout.readline() == "-9\n", step
            Sandbox.cleanup(NAME, settings=fake_vm.settings)
            assert vmm_pids(NAME) == [], step
            assert list((fake_vm.settings.state_root / "sandboxes").glob("*")) == [], step
            assert str(fake_vm.settings.state_root) not in Path("/proc/net/unix").read_text(), step
        owners.stdin.close()
    count("whole life", steps, "owner death")
