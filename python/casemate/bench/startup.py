"""Start-up latency: from the call to the first byte of a container's output, by phase, against the floor.

Boundary of ours: ``Sandbox.create(containers=…, start=True)`` is called → the first byte of the container's output is in this process.
Boundary of the floor: its VMM is started → the first byte of its init's output is in this process. Images and guest assets are made before.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casemate import _core
from casemate.bench import floor
from casemate.bench.image import write_image
from casemate.bench.report import Figure, Report, guest_versions, host_facts, ratios, summarize
from casemate.config.container import ContainerConfig
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.errors import CasemateError, DeadlineExceededError, VmmExitedError
from casemate.types import Phase

if TYPE_CHECKING:
    from casemate.hypervisor.qemu.plan import VmPlan

__all__ = ["BOUNDARY", "measure"]

BOUNDARY = (
    "ours: call of Sandbox.create with one container -> first byte of the container's output in the caller; "
    "floor: spawn of the same VMM, machine, kernel and memory -> first byte of an init that only prints it"
)


class _Sample(msgspec.Struct, frozen=True):
    """One start: wall and processor time in milliseconds, the share of this process in the latter, phases."""

    wall_ms: float
    cpu_ms: float
    own_cpu_ms: float
    phases: tuple[Phase, ...] = ()


def measure(
    config: SandboxConfig,
    *,
    runs: int,
    settings: Settings,
    image: str | None = None,
    command: tuple[str, ...] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Start ``runs`` sandboxes and as many floors in turn, return the report. Blocks: for all of them.

    A run before the first is not counted: it fills caches. A start that fails is counted in ``failures``.

    Raises: as ``Sandbox.create`` when the first, uncounted run fails.
    """
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as scratch:
        reference = image if image is not None else write_image(Path(scratch) / "image")
        container = ContainerConfig(image=reference, command=command)
        plan, versions = _warm_up(config, container, settings)
        initrd = Path(scratch) / "floor.img"
        initrd.write_bytes(floor_initrd())
        ours: list[_Sample] = []
        peers: list[_Sample] = []
        failures = 0
        for number in range(runs):
            progress(f"run {number + 1} of {runs}")
            steps: list[Callable[[], None]] = [
                lambda: ours.append(_start_ours(config, container, settings)),
                lambda: peers.append(
                    _start_floor(plan, initrd, config.timeouts.boot_s * settings.timeout_factor)
                ),
            ]
            for step in steps if number % 2 == 0 else reversed(steps):
                try:
                    step()
                except CasemateError as error:
                    failures += 1
                    progress(f"failed: {error}")
        return _report(ours, peers, failures, runs, versions)


def floor_initrd() -> bytes:
    """The floor's initrd: its init and a console."""
    from casemate.guest import cpio

    return cpio.write(
        [
            cpio.directory("dev"),
            cpio.node("dev/console", 0o600, 5, 1),
            cpio.file("init", floor.init_program(), 0o755),
        ]
    )


def _warm_up(
    config: SandboxConfig, container: ContainerConfig, settings: Settings
) -> tuple[VmPlan, dict[str, str]]:
    from casemate._sync.hypervisor.qemu import Qemu
    from casemate._sync.sandbox import Sandbox

    with Sandbox.create(config, containers=(container,), start=True, settings=settings) as sandbox:
        sandbox.containers[0].process.stdout.read(1)
        record = sandbox.inspect()
        driver = sandbox._own_driver("bench")
        assert isinstance(driver, Qemu)
        plan = driver.vm_plan
        versions = guest_versions(record, driver.qemu.version_text)
    return plan, versions


def _start_ours(config: SandboxConfig, container: ContainerConfig, settings: Settings) -> _Sample:
    from casemate._sync.sandbox import Sandbox

    own_s = time.process_time()
    started_ns = time.perf_counter_ns()
    with Sandbox.create(config, containers=(container,), start=True, settings=settings) as sandbox:
        marks_ns = time.perf_counter_ns()
        sandbox.containers[0].process.stdout.read(1)
        first_ns = time.perf_counter_ns()
        own_ms = (time.process_time() - own_s) * 1e3
        cpu_ms = _cpu_ms(sandbox.vmm_pid)
        phases = (*sandbox.timings, Phase("first_byte", (first_ns - marks_ns) / 1e6))
    teardown = Phase("teardown", (time.perf_counter_ns() - first_ns) / 1e6)
    return _Sample((first_ns - started_ns) / 1e6, cpu_ms + own_ms, own_ms, (*phases, teardown))


def _start_floor(plan: VmPlan, initrd: Path, timeout_s: float) -> _Sample:
    here, there = socket.socketpair()
    with here, there:
        before_s = _children_cpu_s()
        started_ns = time.perf_counter_ns()
        child = _core.spawn(floor_command(plan, initrd, console_fd=3), fds=[(there.fileno(), 3)])
        there.close()
        try:
            _await_byte(here, child, started_ns, timeout_s)
            wall_ms = (time.perf_counter_ns() - started_ns) / 1e6
        finally:
            child.send_signal(9)
            child.wait(10.0)
    # It powers off behind its byte and may be gone already: what it used is told by the system once it was reaped.
    return _Sample(wall_ms, (_children_cpu_s() - before_s) * 1e3, 0.0)


def _await_byte(console: socket.socket, child: _core.ChildProcess, started_ns: int, timeout_s: float) -> None:
    seen = b""
    while floor.BYTE not in seen:
        left_s = timeout_s - (time.perf_counter_ns() - started_ns) / 1e9
        if left_s <= 0 or not select.select([console], [], [], left_s)[0]:
            raise DeadlineExceededError(
                "the floor's byte did not come", deadline_s=timeout_s, waited_s=timeout_s
            )
        piece = console.recv(4096)
        if not piece:
            status = child.wait(10.0)
            tail = child.stderr_tail().decode("utf-8", "replace")
            raise VmmExitedError(f"the floor's VMM ended: {tail}", status=status, log_tail=tail)
        seen = (seen + piece)[-8192:]


def floor_command(plan: VmPlan, initrd: Path, *, console_fd: int) -> list[str]:
    """The command line of the floor: what ``plan`` has of machine, CPU, kernel and memory, and a console."""
    from casemate.hypervisor.qemu.options import render

    options = [(name, value) for name, value in plan.machine_options if name != "memory-backend"]
    append = [word for word in plan.assets.parameters if not word.startswith(("casemate.", "agent."))]
    return [
        *(plan.qemu, "-machine", render(plan.machine, [("accel", plan.accelerator.name), *options])),
        *("-cpu", plan.cpu, "-m", f"{plan.memory_mib}M", "-smp", f"cpus={plan.vcpus}"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-kernel", plan.assets.kernel, "-initrd", str(initrd), "-append", " ".join(append)),
    ]


def _children_cpu_s() -> float:
    """Processor time of all children that ended so far, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cpu_ms(pid: int) -> float:
    """Processor time of a living process so far, in milliseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")


def _report(
    ours: list[_Sample], peers: list[_Sample], failures: int, runs: int, versions: dict[str, str]
) -> Report:
    figures = []
    if ours:
        mine = summarize([one.wall_ms for one in ours], [one.cpu_ms for one in ours])
        floors = (
            {"floor": summarize([one.wall_ms for one in peers], [one.cpu_ms for one in peers])}
            if peers
            else {}
        )
        figures.append(
            Figure(
                name="first_byte",
                unit="ms",
                better="lower",
                n=runs,
                failures=failures,
                ours=mine,
                peers=floors,
                ratio=ratios(mine, floors),
            )
        )
        own = summarize([one.own_cpu_ms for one in ours])
        figures.append(
            Figure(
                name="own_cpu", unit="ms", better="lower", n=len(ours), failures=runs - len(ours), ours=own
            )
        )
        for name in dict.fromkeys(phase.name for one in ours for phase in one.phases):
            values = [phase.duration_ms for one in ours for phase in one.phases if phase.name == name]
            figures.append(
                Figure(
                    name=f"phase_{name}",
                    unit="ms",
                    better="lower",
                    n=len(values),
                    failures=len(ours) - len(values),
                    ours=summarize(values),
                )
            )
    return Report(
        bench="startup",
        boundary=BOUNDARY,
        host=host_facts(),
        versions=versions,
        figures=tuple(figures),
    )
