"""Boots of a real guest to find out which accelerator works: the sandbox of every other start, only smaller, with each of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from casemate._async.sandbox import AsyncSandbox
from casemate._compat import aio as compat
from casemate.config.sandbox import SandboxConfig, TimeoutConfig
from casemate.config.settings import Settings
from casemate.errors import AgentError, DeadlineExceededError, HypervisorError
from casemate.hypervisor.host import HostFacts, read_host_facts
from casemate.hypervisor.proof import BootAttempt, BootProof, proof_key, write_proof
from casemate.hypervisor.qemu.probe import find_qemu

__all__ = ["async_prove_boot"]

KVM_BOOT_S = 20.0
"""A guest comes up with KVM in about a second. Where it never will, it mostly just stays silent."""
TCG_BOOT_S = 120.0
_MEMORY_MIB = 256
PLAIN_CPU = "qemu64"
"""What every KVM can give a guest: so that a CPU model that QEMU can't set up is told from a KVM that runs no guest."""


class _AsyncTrial(AsyncSandbox):
    """A sandbox on the accelerator that its configuration names, whatever is known of it."""

    __slots__ = ()

    _ON_TRIAL = True


async def async_prove_boot(
    *,
    settings: Settings | None = None,
    facts: HostFacts | None = None,
    tell: Callable[[str], None] | None = None,
) -> BootProof:
    """Boot the same guest with KVM, where that can make a VM, and with TCG; keep what came out for later starts.

    Args:
        settings: Where things lie; None: from the environment.
        facts: Of this host, when they were read already.
        tell: Called with a line before each boot.

    Raises:
        NotFoundError, UnsupportedError: There is no QEMU, kernel or agent to boot.
        HostError, ResourceExhaustedError: State or cache can't be written.
    Blocks: for up to three boots, one after the other: with KVM at most 20 s each, with TCG at most 120 s. Nothing is left behind.
    """
    from casemate import guest

    settings = settings if settings is not None else Settings.from_environment()
    facts = facts if facts is not None else read_host_facts()
    qemu = await compat.to_thread(find_qemu, settings.qemu, cache_root=settings.cache_root)
    # Before the boots, so that fetching a kernel is no part of them.
    assets = await compat.to_thread(guest.resolve, machine="q35", settings=settings)
    attempts = []
    if not facts.kvm_error:
        attempts.append(await _attempt("kvm", "", settings, tell))
        if not attempts[0].up:
            attempts.append(await _attempt("kvm", PLAIN_CPU, settings, tell))
    attempts.append(await _attempt("tcg", "", settings, tell))
    proof = BootProof(
        key=proof_key(qemu, facts),
        guest_kernel=assets.kernel_release,
        attempts=tuple(attempts),
        kvm_obstacle=facts.kvm_error,
        made_unix_s=int(time.time()),
    )
    await compat.to_thread(write_proof, settings.cache_root, proof)
    return proof


async def _attempt(
    accel: str, cpu_model: str, settings: Settings, tell: Callable[[str], None] | None
) -> BootAttempt:
    if tell is not None:
        tell(f"booting a guest with {accel.upper()}{f' as {cpu_model}' if cpu_model else ''}")
    config = SandboxConfig(
        name=f"check-{accel}-{os.urandom(4).hex()}",
        accel=accel,
        cpu_model=cpu_model or None,
        memory_mib=_MEMORY_MIB,
        hotplug_ports=0,
        timeouts=TimeoutConfig(boot_s=KVM_BOOT_S if accel == "kvm" else TCG_BOOT_S),
    )
    started = time.monotonic()
    cause = ""
    try:
        sandbox = await _AsyncTrial.create(config, settings=settings)
        duration_ms = (time.monotonic() - started) * 1e3
        await sandbox.aclose()
    except (AgentError, DeadlineExceededError, HypervisorError) as error:
        duration_ms = (time.monotonic() - started) * 1e3
        cause = str(error)
    return BootAttempt(
        accel=accel, cpu_model=cpu_model, up=not cause, duration_ms=round(duration_ms, 1), cause=cause
    )
