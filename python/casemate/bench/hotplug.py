"""Hot-plug latency: from the call until the guest can use a disk or network interface, and until it has let it go.

Split by who needs the time: the VMM (its commands, and its wait for the guest to let go), the guest (until the agent has seen it come or
go), and this process (processor time). The rest is the state document, written before and after.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from casemate.bench.report import Figure, Report, guest_versions, host_facts, summarize
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.errors import CasemateError, HostError

__all__ = ["BOUNDARY", "measure"]

BOUNDARY = (
    "attach: call of attach_block or attach_nic on a running sandbox -> it returns, when the guest's agent has seen the device usable; "
    "detach: call of detach -> it returns, when the guest has let it go and its back end is gone"
)
_LOGGER = "casemate._sync.transaction"


class Sample(msgspec.Struct, frozen=True):
    """One change: milliseconds from call to return, of processor time of this process, and of each step."""

    wall_ms: float
    own_cpu_ms: float
    steps_ms: dict[str, float]


class _Steps(logging.Handler):
    """Keeps what the last plan said of its steps."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.last: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        self.last = getattr(record, "steps_ms", self.last)


def measure(
    config: SandboxConfig,
    *,
    runs: int,
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Attach and detach ``runs`` disks and interfaces on one sandbox, in turn. Blocks: for all of them.

    A change that fails is counted in ``failures``. Where no tap device can be made, interfaces are absent with the reason.

    Raises: as ``Sandbox.create``.
    """
    from casemate._sync.hypervisor.qemu import Qemu
    from casemate._sync.sandbox import Sandbox

    samples: dict[str, list[Sample]] = {}
    failures: dict[str, int] = {}
    absent: dict[str, str] = {}
    steps, logger = _Steps(), logging.getLogger(_LOGGER)
    level = logger.level
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as scratch:
        image = Path(scratch) / "disk.img"
        with image.open("wb") as file:
            file.truncate(1 << 20)
        with Sandbox.create(config, settings=settings) as sandbox:
            record, driver = sandbox.inspect(), sandbox._own_driver("bench")
            assert isinstance(driver, Qemu)
            logger.addHandler(steps)
            logger.setLevel(logging.DEBUG)

            def time_change(name: str, change: Callable[[], Any]) -> Any:
                own_s, started_ns = time.process_time(), time.perf_counter_ns()
                changed = change()
                wall_ms = (time.perf_counter_ns() - started_ns) / 1e6
                own_ms = (time.process_time() - own_s) * 1e3
                samples.setdefault(name, []).append(Sample(wall_ms, own_ms, dict(steps.last)))
                return changed

            attach: dict[str, Callable[[], Any]] = {
                "block": lambda: sandbox.attach_block(image),
                "nic": sandbox.attach_nic,
            }
            try:
                for number in range(runs):
                    progress(f"run {number + 1} of {runs}")
                    for kind in [kind for kind in attach if kind not in absent]:
                        try:
                            device = time_change(f"attach_{kind}", attach[kind])
                            time_change(f"detach_{kind}", functools.partial(sandbox.detach, device))
                        except HostError as error:
                            absent[kind] = str(error)
                        except CasemateError as error:
                            failures[kind] = failures.get(kind, 0) + 1
                            progress(f"failed: {error}")
            finally:
                logger.removeHandler(steps)
                logger.setLevel(level)
            return Report(
                bench="hotplug",
                boundary=BOUNDARY,
                host=host_facts(),
                versions=guest_versions(record, driver.qemu.version_text),
                figures=tuple(
                    figure
                    for name, ones in samples.items()
                    for figure in figures(name, ones, failures.get(name.partition("_")[2], 0))
                ),
                absent=absent,
            )


def figures(name: str, samples: list[Sample], failures: int) -> list[Figure]:
    """The whole, and the shares of VMM, guest and this process."""

    def figure(suffix: str, values: list[float], cpu: list[float] | None = None) -> Figure:
        return Figure(
            name=f"{name}{suffix}",
            unit="ms",
            better="lower",
            n=len(values) + failures,
            failures=failures,
            ours=summarize(values, cpu or ()),
        )

    return [
        figure("", [one.wall_ms for one in samples], [one.own_cpu_ms for one in samples]),
        figure("_vmm", [_share(one, "qemu.") for one in samples]),
        figure("_guest", [_share(one, "guest.") for one in samples]),
        figure("_own_cpu", [one.own_cpu_ms for one in samples]),
    ]


def _share(sample: Sample, prefix: str) -> float:
    return sum(ms for step, ms in sample.steps_ms.items() if step.startswith(prefix))
