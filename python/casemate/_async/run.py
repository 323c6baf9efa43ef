"""One shot: VM up, one container run, VM gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from casemate._async.container import captured
from casemate._async.process import CAPTURE_LIMIT_BYTES
from casemate._async.sandbox import AsyncSandbox
from casemate.config.container import ContainerConfig
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.types import Phase, Progress, RunResult

__all__ = ["async_run", "async_run_container"]


async def async_run(
    image: str,
    command: Sequence[str] | None = None,
    *,
    config: SandboxConfig | None = None,
    entrypoint: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    input: bytes | str | None = None,
    timeout_s: float | None = None,
    limit_bytes: int = CAPTURE_LIMIT_BYTES,
    settings: Settings | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Boot a sandbox, run one container to its end, remove both.

    Args:
        image: ``oci:DIR[:TAG]``, ``oci-archive:FILE``, ``docker-archive:FILE``, a path, or a known name.
        command: In place of the image's command.
        config: The sandbox; None: the defaults, without ports for hot-plug, which nothing here could use.
        entrypoint: In place of the image's entry point.
        env: Variables over the image's. cwd: Working directory. user: ``USER[:GROUP]``.
        input: Its standard input.
        timeout_s: Seconds that the command may take once it was started.
        limit_bytes: Most bytes of output.
        settings: Where things lie; None: from the environment.
        progress: Called with progress events while a kernel is fetched or an image unpacked.

    Returns: Output, exit status and the phases of the start, of the first byte of output and of the end.
    Raises: as :meth:`AsyncSandbox.create`, CommandError, DeadlineExceededError, ResourceExhaustedError.
    Blocks: until all is gone again.
    """
    container = ContainerConfig(
        image=image, command=command, entrypoint=entrypoint, env=env or {}, cwd=cwd, user=user
    )
    return await async_run_container(
        container,
        config=config,
        settings=settings,
        input=input,
        timeout_s=timeout_s,
        limit_bytes=limit_bytes,
        progress=progress,
    )


async def async_run_container(
    container: ContainerConfig,
    *,
    config: SandboxConfig | None = None,
    settings: Settings | None = None,
    input: bytes | str | None = None,
    timeout_s: float | None = None,
    limit_bytes: int = CAPTURE_LIMIT_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """As :func:`async_run`, from a whole container configuration."""
    config = without_ports(config if config is not None else SandboxConfig())
    data = input.encode() if isinstance(input, str) else input
    async with await AsyncSandbox.create(
        config, containers=(container,), start=True, settings=settings, progress=progress
    ) as sandbox:
        (only,) = sandbox.containers
        started_ns = time.perf_counter_ns()
        stdout, stderr = await only.process.communicate(data, timeout_s=timeout_s, limit_bytes=limit_bytes)
        ended_ns = time.perf_counter_ns()
        result = captured(only.process, stdout, stderr)
        kernel = sandbox.inspect().kernel_release
    first_ns = only.process.stdout.first_ns
    marks = sandbox.timings
    phases = [*marks[:-1]]
    if first_ns is not None:
        phases.append(Phase("first_byte", max(first_ns - started_ns, 0) / 1e6))
    phases.append(Phase("run", (ended_ns - max(first_ns or started_ns, started_ns)) / 1e6))
    return RunResult(
        exit_code=result.exit_code,
        stdout_bytes=result.stdout_bytes,
        stderr_bytes=result.stderr_bytes,
        sandbox_id=sandbox.id,
        guest_kernel=kernel,
        timings=(*phases, Phase("teardown", (time.perf_counter_ns() - ended_ns) / 1e6)),
    )


def without_ports(config: SandboxConfig) -> SandboxConfig:
    """The configuration without hot-plug ports, unless their number was asked for: they cost boot time."""
    return config if config.hotplug_ports is not None else replace(config, hotplug_ports=0)
