"""``casemate check --boot``: which accelerator works, proven by guests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from casemate import Sandbox, SandboxConfig, Settings
from casemate._sync.boot_proof import KVM_BOOT_S, prove_boot
from casemate.hypervisor.host import HostFacts, read_host_facts
from casemate.hypervisor.proof import BootProof

pytestmark = [pytest.mark.root, pytest.mark.qemu]
CHECK = [sys.executable, "-m", "casemate", "check"]
UNDO_S = 15


@pytest.fixture
def own_cache(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with a cache without proofs; kernels and initrds are the common ones."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "guest").symlink_to(settings.cache_root / "guest")
    monkeypatch.setenv("CASEMATE_CACHE", str(cache))
    return Settings.from_environment()


def test_check_when_booted_then_guests_prove_which_accelerator_works_and_auto_goes_by_it(
    own_cache: Settings,
) -> None:
    facts = read_host_facts()
    is_pvm = facts.pvm and not facts.has_hardware_virtualisation and not facts.kvm_error

    done = subprocess.run([*CHECK, "--boot", "--json"], capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    up = {(one["accel"], one["cpu_model"]): one["up"] for one in document["boot"]["attempts"]}
    with_kvm = [one for one in document["boot"]["attempts"] if one["accel"] == "kvm"]
    assert document["ok"] and up["tcg", ""]
    assert bool(with_kvm) == (not facts.kvm_error)
    assert document["accelerator"] == ("kvm" if up.get(("kvm", "")) else "tcg")
    # A guest that does not come up says why, in bounded time.
    assert all(one["up"] != bool(one["cause"]) for one in document["boot"]["attempts"])
    assert all(
        one["duration_ms"] < (KVM_BOOT_S * own_cache.timeout_factor + UNDO_S) * 1e3 for one in with_kvm
    )
    assert document["pvm"] == is_pvm
    assert not (is_pvm and any(one["up"] for one in with_kvm))
    assert "booting a guest with TCG" in done.stderr

    # What was found out is what later calls and starts go by.
    text = subprocess.run(CHECK, capture_output=True, text=True, timeout=60).stdout
    (kvm,) = [line for line in text.splitlines() if line.split()[1:2] == ["kvm"]]
    assert ("PVM" in kvm and "proven by boot" in kvm) == is_pvm
    assert f"{document['accelerator'].upper()} is used" in text
    with Sandbox.create(SandboxConfig(hotplug_ports=0), settings=own_cache) as sandbox:
        assert sandbox.inspect().accel == document["accelerator"]
        assert sandbox.inspect().accel_reason == document["accelerator_reason"]


def test_prove_boot_when_kvm_cannot_be_opened_then_only_software_is_tried(own_cache: Settings) -> None:
    told: list[str] = []
    facts = HostFacts(memory_mib=4096, cpu_flags=frozenset(), kvm_error="/dev/kvm is shut", pvm=False)

    proof: BootProof = prove_boot(settings=own_cache, facts=facts, tell=told.append)

    assert told == ["booting a guest with TCG"]
    assert [(one.accel, one.up) for one in proof.attempts] == [("tcg", True)]
    assert proof.kvm_obstacle == "/dev/kvm is shut"
    # It decides nothing about KVM, so it is not kept.
    assert proof.kvm_works is None
    assert not (own_cache.cache_root / "boot-proof.json").exists()
