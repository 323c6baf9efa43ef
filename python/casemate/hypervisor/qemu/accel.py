"""The choice between KVM and software emulation, with its reason in words.

That ``/dev/kvm`` opens proves nothing: there is a KVM that runs without the CPU's virtualisation (PVM), and on it no stock guest comes up.
Where a guest was booted to find out (``casemate check --boot``), that proof decides; else the signs of host and CPU do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.hypervisor.host import HostFacts

if TYPE_CHECKING:
    from casemate.hypervisor.proof import BootProof

__all__ = ["PROOF_FILE", "Accelerator", "choose_accelerator"]

PROOF_FILE = "boot-proof.json"
"""Where a proof is kept, below the cache root."""


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """``name`` is ``"kvm"`` or ``"tcg"``, ``reason`` says why it was chosen."""

    name: str
    reason: str


def choose_accelerator(
    wanted: str,
    facts: HostFacts,
    *,
    pvm_kernel: bool = False,
    proof: BootProof | None = None,
) -> Accelerator:
    """The accelerator for ``wanted`` (``auto``, ``kvm``, ``tcg``) on a host with ``facts``. Does not block.

    Args:
        pvm_kernel: The guest's kernel says that it runs on PVM.
        proof: What a boot of a stock guest has shown on this host, if there was one.

    Raises:
        UnsupportedError: KVM is wanted and would not work; the text says why.
        InvalidConfigError: ``wanted`` is no accelerator.
    """
    if wanted == "tcg":
        return Accelerator(name="tcg", reason="asked for")
    if wanted not in ("auto", "kvm"):
        raise InvalidConfigError(f"accel is {wanted!r}, 'auto', 'kvm' or 'tcg' is expected", path="accel")
    proven = None if facts.kvm_error or pvm_kernel or proof is None else proof.kvm_works
    if proof is not None and proven:
        kvm = proof.attempt("kvm")
        duration_ms = 0.0 if kvm is None else kvm.duration_ms
        return Accelerator(name="kvm", reason=f"proven: a guest came up with KVM in {duration_ms:.0f} ms")
    obstacle = _obstacle(facts, pvm_kernel)
    if proof is not None and proven is False:
        failed = f"proven: a guest that comes up in software does not with KVM ({proof.kvm_cause})"
        obstacle = f"{obstacle}; {failed}" if obstacle else failed
    if not obstacle:
        works = (
            "KVM on PVM, with a kernel made for it"
            if _is_pvm(facts)
            else "KVM makes VMs and the CPU virtualises"
        )
        return Accelerator(name="kvm", reason=works)
    if wanted == "kvm":
        raise UnsupportedError(
            f"accel 'kvm' can't be used: {obstacle}; use 'tcg' or 'auto' ('casemate check --boot' looks again)",
            capability="kvm",
        )
    return Accelerator(name="tcg", reason=f"no KVM: {obstacle}")


def _is_pvm(facts: HostFacts) -> bool:
    return facts.pvm and not facts.has_hardware_virtualisation


def _obstacle(facts: HostFacts, pvm_kernel: bool) -> str:
    if facts.kvm_error:
        return facts.kvm_error
    if facts.has_hardware_virtualisation:
        return ""
    if not facts.pvm:
        return "the CPU has neither vmx nor svm (in a VM: nested virtualisation is off)"
    if not pvm_kernel:
        return "this host's KVM is PVM, without vmx or svm, and the guest's kernel is not made for PVM"
    return ""
