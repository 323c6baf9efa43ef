"""All findings of a host together, and whether sandboxes can start on it."""

from __future__ import annotations

import msgspec

from casemate.config.settings import Settings
from casemate.errors import CasemateError
from casemate.host import cgroup, devices, kernel, space, tools
from casemate.host.finding import Finding
from casemate.hypervisor.host import HostFacts, read_host_facts
from casemate.hypervisor.proof import BootProof, proof_key, read_proof
from casemate.hypervisor.qemu.accel import choose_accelerator
from casemate.hypervisor.qemu.probe import QemuBinary, find_qemu

__all__ = ["HostReport", "find_accelerator", "find_boot", "find_kvm", "look_at_host"]

_NESTED = "turn on VT-x or AMD-V in the firmware; in a virtual machine: nested virtualisation on its host"


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a host can do.

    Args:
        ok: Everything that is needed is there: sandboxes can start.
        accelerator: What ``auto`` means here, ``kvm`` or ``tcg``.
        accelerator_reason: Why.
        pvm: KVM is there but runs no stock guest, for it works without the CPU's virtualisation.
        boot: The boots that prove it, of this call or kept from an earlier one; None: there was none.
        findings: One for each thing that was looked at.
    """

    ok: bool
    accelerator: str
    accelerator_reason: str
    pvm: bool
    boot: BootProof | None
    findings: tuple[Finding, ...]


def look_at_host(
    settings: Settings, *, facts: HostFacts | None = None, proof: BootProof | None = None
) -> HostReport:
    """Look at everything. Nothing is changed.

    Args:
        facts: Of this host, when they were read already.
        proof: Boots that were just made; None: those that were kept and still hold.

    Raises:
        HostError: ``proc`` can't be read.
    Blocks: for file reads; the first time for a process for each tool.
    """
    facts = facts if facts is not None else read_host_facts()
    qemu, qemu_finding = _find_qemu(settings)
    if proof is None and qemu is not None:
        proof = read_proof(settings.cache_root, proof_key(qemu, facts))
    chosen = choose_accelerator("auto", facts, proof=proof)
    findings = [
        find_accelerator(facts, proof),
        find_kvm(facts, proof),
        find_boot(proof),
        qemu_finding,
        _find_agent(),
        _find_guest_kernel(settings),
        devices.find_vsock(wanted=settings.vsock),
        devices.find_tap(),
        cgroup.find_cgroup(),
        space.find_memory(),
        space.find_disk("disk.state", settings.state_root, 16),
        space.find_disk("disk.cache", settings.cache_root),
        kernel.find_cpu(facts),
        kernel.find_nesting(facts),
        kernel.find_protection(),
        kernel.find_numa(),
        kernel.find_modules(facts),
        kernel.find_bpf_jit(),
        *(tools.find_tool(tool, cache_root=settings.cache_root) for tool in tools.TOOLS),
    ]
    return HostReport(
        ok=not any(finding.needed and finding.state == "no" for finding in findings),
        accelerator=chosen.name,
        accelerator_reason=chosen.reason,
        pvm=facts.pvm and not facts.has_hardware_virtualisation,
        boot=proof,
        findings=tuple(findings),
    )


def find_accelerator(facts: HostFacts, proof: BootProof | None) -> Finding:
    """What ``accel = "auto"`` comes to. Does not block."""
    chosen = choose_accelerator("auto", facts, proof=proof)
    if chosen.name == "kvm":
        return Finding(name="accelerator", state="yes", text=f"KVM is used ({chosen.reason})", needed=True)
    return Finding(
        name="accelerator",
        state="partly",
        text=f"TCG is used: software emulation, some ten times slower ({chosen.reason})",
        needed=True,
    )


def find_kvm(facts: HostFacts, proof: BootProof | None) -> Finding:
    """Whether KVM runs guests, by proof where there is one, else by its signs. Does not block."""
    data = {
        "device_error": facts.kvm_error,
        "modules": facts.kvm_modules,
        "hardware_virtualisation": facts.has_hardware_virtualisation,
        "pvm": facts.pvm,
        "proven": None if proof is None else proof.kvm_works,
    }
    is_pvm = facts.pvm and not facts.has_hardware_virtualisation
    what = (
        "this host's KVM is PVM (module kvm_pvm, a CPU without vmx and svm): it makes VMs but runs no stock guest"
        if is_pvm
        else "KVM"
    )
    if facts.kvm_error:
        missing = "can't be opened: No such file" in facts.kvm_error
        cure = _NESTED if missing and not facts.has_hardware_virtualisation else ""
        cure = cure or ("modprobe kvm_intel or kvm_amd" if missing else "leave to read and write /dev/kvm")
        return Finding(name="kvm", state="no", text=facts.kvm_error, cure=cure, facts=data)
    if proof is not None and proof.kvm_works:
        if is_pvm:
            what = "this host's KVM is PVM (module kvm_pvm)"
        return Finding(name="kvm", state="yes", text=f"{what}: a guest came up with it", facts=data)
    if proof is not None and proof.kvm_works is False:
        head = what if is_pvm else "KVM makes VMs, but a guest does not come up with it"
        plain = next((a for a in proof.attempts if a.accel == "kvm" and a.cpu_model and a.up), None)
        if plain is not None:
            cure = f"accel 'kvm' with cpu_model '{plain.cpu_model}' works; accel 'auto' does not risk it"
        else:
            cure = "a host with VT-x or AMD-V, or nested virtualisation on this one's host"
        if is_pvm:
            cure += "; or a guest kernel made for PVM"
        return Finding(
            name="kvm", state="no", text=f"{head}; proven by boot: {proof.kvm_cause}", cure=cure, facts=data
        )
    if is_pvm:
        return Finding(
            name="kvm",
            state="no",
            text=what,
            cure="a host with VT-x or AMD-V, or nested virtualisation on this one's host; or a guest kernel made for PVM",
            facts=data,
        )
    if not facts.has_hardware_virtualisation:
        return Finding(
            name="kvm",
            state="no",
            text="/dev/kvm makes VMs, but the CPU has neither vmx nor svm",
            cure=_NESTED,
            facts=data,
        )
    return Finding(
        name="kvm",
        state="yes",
        text="/dev/kvm makes VMs and the CPU virtualises; 'casemate check --boot' proves it by a guest",
        facts=data,
    )


def find_boot(proof: BootProof | None) -> Finding:
    """What real boots have shown. Does not block."""
    if proof is None:
        return Finding(
            name="boot",
            state="partly",
            text="no guest was booted to prove it",
            cure="casemate check --boot",
        )
    words = []
    for attempt in proof.attempts:
        name = attempt.accel.upper() + (f" as {attempt.cpu_model}" if attempt.cpu_model else "")
        duration_s = attempt.duration_ms / 1e3
        told = attempt.cause.partition("\n")[0]
        words.append(f"{name} came up in {duration_s:.1f} s" if attempt.up else f"{name} did not: {told}")
    if proof.kvm_obstacle:
        words.insert(0, f"KVM was not tried: {proof.kvm_obstacle}")
    up = any(attempt.up for attempt in proof.attempts)
    return Finding(
        name="boot",
        state="yes" if up else "no",
        text=f"kernel {proof.guest_kernel}: {'; '.join(words)}",
        cure="" if up else "CASEMATE_TIMEOUT_FACTOR=4 where the host is only slow",
        needed=True,
        facts=msgspec.to_builtins(proof),
    )


def _find_qemu(settings: Settings) -> tuple[QemuBinary | None, Finding]:
    try:
        qemu = find_qemu(settings.qemu, cache_root=settings.cache_root)
    except CasemateError as error:
        return None, Finding(name="qemu", state="no", text=str(error), cure=_qemu_cure(), needed=True)
    return qemu, Finding(
        name="qemu",
        state="yes",
        text=f"{qemu.path} {qemu.version_text}",
        needed=True,
        facts={"path": qemu.path, "version": qemu.version_text},
    )


def _qemu_cure() -> str:
    return "install qemu-system-x86 (Fedora: qemu-system-x86-core), or name a binary by CASEMATE_QEMU"


def _find_agent() -> Finding:
    from casemate.guest.assets import agent_path

    try:
        path = agent_path()
    except CasemateError as error:
        return Finding(
            name="agent", state="no", text=str(error), cure="install a wheel of casemate", needed=True
        )
    return Finding(name="agent", state="yes", text=str(path), needed=True, facts={"path": str(path)})


def _find_guest_kernel(settings: Settings) -> Finding:
    from casemate.guest.store import Store

    store = Store(settings.cache_root / "guest")
    entry = store.read_current("auto")
    if entry is None:
        return Finding(
            name="guest_kernel",
            state="partly",
            text="none is in the cache: the first start fetches one",
            cure="casemate guest build, where that shall happen now",
        )
    return Finding(
        name="guest_kernel",
        state="yes",
        text=f"{entry.release} ({entry.source})",
        facts={"release": entry.release, "source": entry.source, "path": str(store.kernel_path(entry))},
    )
