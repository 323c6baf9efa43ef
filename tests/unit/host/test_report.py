"""What is made of the facts: sentences, cures, and whether sandboxes can start."""

from __future__ import annotations

from pathlib import Path

import pytest

from casemate.config.settings import Settings
from casemate.host.report import find_accelerator, find_boot, find_kvm, look_at_host
from casemate.hypervisor.host import HostFacts
from tests.unit.hypervisor.test_proof import FAILS, WORKS, attempt, facts, proof

ABSENT = "/dev/kvm can't be opened: No such file or directory"


@pytest.mark.parametrize(
    ("host", "text", "cure"),
    [
        (facts("vmx", kvm_error=ABSENT), "No such file", "modprobe kvm_intel or kvm_amd"),
        (facts(kvm_error=ABSENT), "No such file", "nested virtualisation"),
        (facts("vmx", kvm_error="/dev/kvm can't be opened: Permission denied"), "denied", "leave to read"),
        (facts(pvm=True), "KVM is PVM", "guest kernel made for PVM"),
        (facts(), "neither vmx nor svm", "nested virtualisation"),
    ],
)
def test_kvm_when_it_will_not_do_then_reason_and_cure_are_told(host: HostFacts, text: str, cure: str) -> None:
    found = find_kvm(host, None)

    assert found.state == "no"
    assert text in found.text
    assert cure in found.cure


def test_kvm_when_signs_are_good_then_a_proof_is_proposed() -> None:
    found = find_kvm(facts("vmx"), None)

    assert found.state == "yes"
    assert "casemate check --boot" in found.text


def test_kvm_when_proven_then_the_proof_is_told_and_not_the_sign() -> None:
    assert find_kvm(facts("vmx"), FAILS).state == "no"
    assert "KVM failed: MSR" in find_kvm(facts("vmx"), FAILS).text
    assert find_kvm(facts(pvm=True), WORKS).state == "yes"
    assert "PVM" in find_kvm(facts(pvm=True), FAILS).text


def test_kvm_when_only_a_plain_cpu_comes_up_then_the_cure_names_it() -> None:
    plain = proof(attempt("kvm", "MSR"), attempt("kvm", "", "qemu64"), attempt("tcg"))

    assert "cpu_model 'qemu64'" in find_kvm(facts("vmx"), plain).cure


def test_accelerator_then_says_which_is_used_and_why() -> None:
    assert find_accelerator(facts("vmx"), None).text.startswith("KVM is used")
    assert find_accelerator(facts(pvm=True), FAILS).text.startswith("TCG is used")
    assert find_accelerator(facts(pvm=True), FAILS).state == "partly"


def test_boot_then_each_boot_is_told_in_order() -> None:
    text = find_boot(FAILS).text

    assert text.index("KVM did not: KVM failed: MSR") < text.index("KVM as qemu64 did not: silent")
    assert text.endswith("TCG came up in 0.8 s")
    assert find_boot(None).cure == "casemate check --boot"


def test_boot_when_no_guest_came_up_then_nothing_can_start() -> None:
    found = find_boot(proof(attempt("tcg", "too slow")))

    assert (found.state, found.needed) == ("no", True)
    assert "CASEMATE_TIMEOUT_FACTOR" in found.cure


def test_host_when_qemu_is_missing_then_not_ok_and_the_package_is_named(tmp_path: Path) -> None:
    settings = Settings(state_root=tmp_path / "s", cache_root=tmp_path / "c", qemu=str(tmp_path / "qemu"))

    report = look_at_host(settings, facts=facts("vmx"))

    by_name = {finding.name: finding for finding in report.findings}
    assert not report.ok
    assert by_name["qemu"].state == "no"
    assert "qemu-system-x86" in by_name["qemu"].cure


def test_host_when_looked_at_then_every_no_has_a_reason_and_nothing_is_made(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 7.2.1\n")
    qemu.chmod(0o755)
    settings = Settings(state_root=tmp_path / "s", cache_root=tmp_path / "c", qemu=str(qemu))

    report = look_at_host(settings, facts=facts(pvm=True))

    assert report.pvm
    assert report.accelerator == "tcg"
    assert report.boot is None
    assert len({finding.name for finding in report.findings}) == len(report.findings)
    assert all(finding.text for finding in report.findings)
    assert not settings.state_root.exists()
    # What was found out about programs is kept, nothing else.
    assert {path.name for path in settings.cache_root.iterdir()} <= {"qemu-probe.json", "tool-versions.json"}
