"""When a proof by boot holds, what it decides, and what it means for the choice of the accelerator."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from casemate.errors import UnsupportedError
from casemate.hypervisor.host import HostFacts
from casemate.hypervisor.proof import BootAttempt, BootProof, ProofKey, proof_key, read_proof, write_proof
from casemate.hypervisor.qemu.accel import choose_accelerator
from casemate.hypervisor.qemu.probe import QemuBinary

KEY = ProofKey(
    boot_id="b", host_kernel="6.1", kvm_modules=("kvm",), qemu="/q", qemu_size_bytes=1, qemu_modified_ns=2
)


def facts(*flags: str, kvm_error: str = "", pvm: bool = False) -> HostFacts:
    return HostFacts(
        memory_mib=1, cpu_flags=frozenset(flags), kvm_error=kvm_error, pvm=pvm, kvm_modules=("kvm",)
    )


def attempt(accel: str, cause: str = "", cpu_model: str = "") -> BootAttempt:
    return BootAttempt(accel=accel, cpu_model=cpu_model, up=not cause, duration_ms=812.3, cause=cause)


def proof(*attempts: BootAttempt, key: ProofKey = KEY) -> BootProof:
    return BootProof(key=key, guest_kernel="6.12", attempts=attempts)


WORKS = proof(attempt("kvm"), attempt("tcg"))
FAILS = proof(attempt("kvm", "KVM failed: MSR\nmore"), attempt("kvm", "silent", "qemu64"), attempt("tcg"))


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (WORKS, True),
        (FAILS, False),
        (proof(attempt("kvm"), attempt("tcg", "too slow")), True),
        (proof(attempt("kvm", "too slow"), attempt("tcg", "too slow")), None),
        (proof(attempt("kvm", "MSR"), attempt("kvm", "", "qemu64"), attempt("tcg")), False),
        (proof(attempt("tcg")), None),
    ],
)
def test_proof_then_kvm_is_only_blamed_when_software_came_up(made: BootProof, verdict: bool | None) -> None:
    assert made.kvm_works is verdict


def test_proof_when_kept_then_holds_for_the_same_key_alone(tmp_path: Path) -> None:
    assert write_proof(tmp_path, FAILS)

    assert read_proof(tmp_path, KEY) == FAILS
    others = [
        msgspec.structs.replace(KEY, **{name: value})
        for name, value in {
            "boot_id": "c",
            "host_kernel": "6.2",
            "kvm_modules": ("kvm", "kvm_intel"),
            "qemu": "/r",
            "qemu_size_bytes": 9,
            "qemu_modified_ns": 9,
        }.items()
    ]
    assert [read_proof(tmp_path, other) for other in others] == [None] * len(ProofKey.__struct_fields__)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}'])
def test_proof_when_damaged_then_is_none_and_can_be_made_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / "boot-proof.json").write_text(content)

    assert read_proof(tmp_path, KEY) is None
    assert write_proof(tmp_path, FAILS)
    assert read_proof(tmp_path, KEY) == FAILS


def test_proof_when_it_decides_nothing_then_is_not_kept(tmp_path: Path) -> None:
    assert not write_proof(tmp_path, proof(attempt("tcg")))
    assert list(tmp_path.iterdir()) == []


def test_key_then_names_boot_kernel_modules_and_the_binary(tmp_path: Path) -> None:
    binary = tmp_path / "qemu"
    binary.write_text("four")
    os.utime(binary, ns=(5, 6))
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("abc\n")

    key = proof_key(QemuBinary(path=str(binary), version=(7, 2, 0)), facts("vmx"), tmp_path)

    assert key == ProofKey(
        boot_id="abc",
        host_kernel=os.uname().release,
        kvm_modules=("kvm",),
        qemu=str(binary),
        qemu_size_bytes=4,
        qemu_modified_ns=6,
    )


def test_key_when_host_has_no_boot_id_then_no_earlier_proof_holds(tmp_path: Path) -> None:
    (tmp_path / "qemu").touch()
    qemu = QemuBinary(path=str(tmp_path / "qemu"), version=(7, 2, 0))

    assert proof_key(qemu, facts(), tmp_path) != proof_key(qemu, facts(), tmp_path)


def test_accelerator_when_kvm_is_proven_to_fail_then_signs_do_not_help() -> None:
    chosen = choose_accelerator("auto", facts("vmx"), proof=FAILS)

    assert chosen.name == "tcg"
    assert "KVM failed: MSR" in chosen.reason
    assert "more" not in chosen.reason
    with pytest.raises(UnsupportedError, match="casemate check --boot"):
        choose_accelerator("kvm", facts("vmx"), proof=FAILS)


@pytest.mark.parametrize("host", [facts("vmx"), facts(), facts(pvm=True)])
def test_accelerator_when_kvm_is_proven_to_work_then_signs_do_not_matter(host: HostFacts) -> None:
    for wanted in ("auto", "kvm"):
        chosen = choose_accelerator(wanted, host, proof=WORKS)
        assert (chosen.name, "812 ms" in chosen.reason) == ("kvm", True)


def test_accelerator_when_device_is_shut_now_then_an_earlier_proof_does_not_open_it() -> None:
    assert choose_accelerator("auto", facts("vmx", kvm_error="denied"), proof=WORKS).name == "tcg"


def test_accelerator_when_kernel_is_made_for_pvm_then_the_stock_guests_proof_says_nothing() -> None:
    assert choose_accelerator("auto", facts(pvm=True), pvm_kernel=True, proof=FAILS).name == "kvm"


def test_accelerator_when_proof_decides_nothing_then_signs_do() -> None:
    undecided = proof(attempt("kvm", "slow"), attempt("tcg", "slow"))

    assert choose_accelerator("auto", facts("vmx"), proof=undecided).name == "kvm"
    assert choose_accelerator("auto", facts(), proof=undecided).name == "tcg"
