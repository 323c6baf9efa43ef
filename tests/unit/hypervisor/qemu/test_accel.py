from __future__ import annotations

import pytest

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.hypervisor.host import HostFacts
from casemate.hypervisor.qemu.accel import choose_accelerator


def facts(*flags: str, kvm_error: str = "", pvm: bool = False) -> HostFacts:
    return HostFacts(memory_mib=1024, cpu_flags=frozenset(flags), kvm_error=kvm_error, pvm=pvm)


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_accelerator_when_kvm_and_cpu_work_then_is_kvm(flag: str) -> None:
    for wanted in ("auto", "kvm"):
        assert choose_accelerator(wanted, facts(flag)).name == "kvm"


def test_accelerator_when_device_does_not_open_then_is_tcg_with_the_reason() -> None:
    chosen = choose_accelerator("auto", facts("vmx", kvm_error="/dev/kvm can't be opened: Permission denied"))

    assert chosen.name == "tcg"
    assert "Permission denied" in chosen.reason


def test_accelerator_when_cpu_lacks_virtualisation_then_an_open_device_proves_nothing() -> None:
    assert choose_accelerator("auto", facts("fpu")).name == "tcg"
    assert "nested" in choose_accelerator("auto", facts("fpu")).reason


def test_accelerator_when_host_is_pvm_then_needs_a_kernel_for_it() -> None:
    host = facts("fpu", pvm=True)

    assert "PVM" in choose_accelerator("auto", host).reason
    assert choose_accelerator("auto", host).name == "tcg"
    assert choose_accelerator("auto", host, pvm_kernel=True).name == "kvm"


def test_accelerator_when_pvm_module_is_loaded_beside_vmx_then_is_kvm() -> None:
    assert choose_accelerator("auto", facts("vmx", pvm=True)).name == "kvm"


@pytest.mark.parametrize("host", [facts("vmx", kvm_error="no device"), facts(), facts(pvm=True)])
def test_accelerator_when_kvm_is_demanded_and_missing_then_says_why(host: HostFacts) -> None:
    with pytest.raises(UnsupportedError, match="'kvm' can't be used: ") as caught:
        choose_accelerator("kvm", host)

    assert caught.value.capability == "kvm"


def test_accelerator_when_tcg_is_demanded_then_kvm_is_not_looked_at() -> None:
    assert choose_accelerator("tcg", facts("vmx")).name == "tcg"


def test_accelerator_when_unknown_then_raises() -> None:
    with pytest.raises(InvalidConfigError):
        choose_accelerator("hvf", facts())
