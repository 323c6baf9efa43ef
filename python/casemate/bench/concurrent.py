"""Many sandboxes of one asyncio program at once, against as many one after the other: what being many costs the program itself.

The peer ``plain`` is the same work one by one. Processor time of the VMMs is reported; it is the guests' and no figure of ours.
"""

from __future__ import annotations

import asyncio
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from casemate.bench.image import write_image
from casemate.bench.report import Figure, Report, host_facts, own_versions, ratios, summarize
from casemate.config.container import ContainerConfig
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings

__all__ = ["BOUNDARY", "Sample", "figures", "measure"]

COUNT = 10
BOUNDARY = (
    f"{COUNT} times: create a sandbox with one started container, read its first output, close it; own_cpu: processor time "
    "of the program with all its threads; vmm_cpu: that of the VMMs; wall: until the last is closed"
)


class Sample(msgspec.Struct, frozen=True):
    """One round: milliseconds on the clock, of the program's processor time and of its VMMs'."""

    wall: float
    own_cpu: float
    vmm_cpu: float


def measure(
    config: SandboxConfig,
    *,
    runs: int,
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run ``runs`` rounds of each side, in turn. Blocks: for all of them. Raises: as ``AsyncSandbox.create``."""
    return asyncio.run(_measure(config, runs, settings, progress))


async def _measure(
    config: SandboxConfig, runs: int, settings: Settings, progress: Callable[[str], None]
) -> Report:
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as directory:
        container = ContainerConfig(name="main", image=write_image(Path(directory) / "image"))

        async def live() -> None:
            from casemate._async.sandbox import AsyncSandbox

            async with await AsyncSandbox.create(
                config, containers=(container,), start=True, settings=settings
            ) as sandbox:
                await sandbox.container().process.stdout.read(1)

        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(COUNT):
                    group.create_task(live())

        async def one_by_one() -> None:
            for _ in range(COUNT):
                await live()

        config = replace(config, name=None)
        progress("warm-up")
        await live()
        ours, plain = [], []
        for number in range(runs):
            progress(f"round {number + 1} of {runs}")
            plain.append(await _timed(one_by_one))
            ours.append(await _timed(together))
    return Report(
        bench="concurrent",
        boundary=BOUNDARY,
        host=host_facts(),
        versions=own_versions(),
        figures=figures(ours, plain),
    )


async def _timed(work: Callable[[], Awaitable[None]]) -> Sample:
    wall, own, vmms = time.perf_counter(), time.process_time(), _children_s()
    await work()
    return Sample(
        wall=(time.perf_counter() - wall) * 1000,
        own_cpu=(time.process_time() - own) * 1000,
        vmm_cpu=(_children_s() - vmms) * 1000,
    )


def _children_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def figures(ours: list[Sample], plain: list[Sample]) -> tuple[Figure, ...]:
    """The figures, that of the promise first."""
    made = []
    for name in ("own_cpu", "vmm_cpu", "wall"):
        side = summarize([getattr(sample, name) for sample in ours])
        peers = {"plain": summarize([getattr(sample, name) for sample in plain])}
        made.append(
            Figure(
                name=f"{name}_of_{COUNT}",
                unit="ms",
                better="lower",
                n=len(ours),
                failures=0,
                ours=side,
                peers=peers,
                ratio=ratios(side, peers),
            )
        )
    return tuple(made)
