"""What a real boot has shown of this host's accelerators, and until when that holds.

A proof is kept under the cache root and holds as long as what it depends on is the same: the host's boot and kernel, the KVM modules, the
QEMU binary. The boots themselves are in ``casemate._async.boot_proof``.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from casemate.host import kept
from casemate.hypervisor.host import HostFacts
from casemate.hypervisor.qemu.accel import PROOF_FILE
from casemate.hypervisor.qemu.probe import QemuBinary

__all__ = ["BootAttempt", "BootProof", "ProofKey", "proof_key", "read_proof", "write_proof"]


class BootAttempt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One boot of a guest, from the VMM's start to the agent's answer.

    Args:
        accel: ``kvm`` or ``tcg``.
        cpu_model: What the guest was given; empty for the one that a sandbox gets.
        up: The agent answered.
        duration_ms: Until the answer, or until it was given up.
        cause: Why not, empty when it did.
    """

    accel: str
    cpu_model: str
    up: bool
    duration_ms: float
    cause: str = ""


class ProofKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a proof depends on; one with another key is none."""

    boot_id: str
    host_kernel: str
    kvm_modules: tuple[str, ...]
    qemu: str
    qemu_size_bytes: int
    qemu_modified_ns: int


class BootProof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Boots of the same guest on each accelerator, in order.

    Args:
        guest_kernel: Release of the guest's kernel, a stock one.
        kvm_obstacle: Why KVM was not tried, empty when it was.
        made_unix_s: When.
    """

    version: int = 1
    key: ProofKey
    guest_kernel: str
    attempts: tuple[BootAttempt, ...]
    kvm_obstacle: str = ""
    made_unix_s: int = 0

    def attempt(self, accel: str, cpu_model: str = "") -> BootAttempt | None:
        """The boot with ``accel`` and ``cpu_model``; None when there was none."""
        return next((a for a in self.attempts if (a.accel, a.cpu_model) == (accel, cpu_model)), None)

    @property
    def kvm_works(self) -> bool | None:
        """Whether a sandbox boots with KVM; None when that is not decided.

        That it does not is decided only by a guest that came up in software: a host on which neither comes up is too slow, or the guest
        is broken, and KVM is not to blame.
        """
        kvm, tcg = self.attempt("kvm"), self.attempt("tcg")
        if kvm is None:
            return None
        if kvm.up:
            return True
        return False if tcg is not None and tcg.up else None

    @property
    def kvm_cause(self) -> str:
        """Why the guest did not come up with KVM, in one line."""
        causes = [attempt.cause for attempt in self.attempts if attempt.accel == "kvm" and attempt.cause]
        return causes[0].partition("\n")[0] if causes else self.kvm_obstacle


def proof_key(qemu: QemuBinary, facts: HostFacts, root: Path = Path("/")) -> ProofKey:
    """What a proof made now would depend on. Blocks: for a file read."""
    try:
        boot_id = (root / "proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        # Without it a proof would outlive the host's boot: a random one makes it hold for this call alone.
        boot_id = os.urandom(16).hex()
    stat = os.stat(qemu.path)
    return ProofKey(
        boot_id=boot_id,
        host_kernel=os.uname().release,
        kvm_modules=facts.kvm_modules,
        qemu=qemu.path,
        qemu_size_bytes=stat.st_size,
        qemu_modified_ns=stat.st_mtime_ns,
    )


def read_proof(cache_root: Path, key: ProofKey) -> BootProof | None:
    """The proof that was kept, if it still holds. Blocks: for a file read."""
    proof = kept.load(cache_root / PROOF_FILE, BootProof)
    return proof if proof is not None and proof.version == 1 and proof.key == key else None


def write_proof(cache_root: Path, proof: BootProof) -> bool:
    """Keep ``proof``, unless it decides nothing; whether it is kept. Blocks: for a file write."""
    return proof.kvm_works is not None and kept.store(cache_root / PROOF_FILE, proof)
