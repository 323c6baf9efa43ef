from __future__ import annotations

import pytest

from casemate.errors import InvalidConfigError
from casemate.guest.parameters import kernel_parameters


def _names(parameters: tuple[str, ...]) -> list[str]:
    return [parameter.partition("=")[0] for parameter in parameters]


def test_kernel_parameters_for_q35_and_kvm_in_full() -> None:
    assert kernel_parameters("q35", "kvm", max_vcpus=4) == (
        "tsc=reliable", "no_timer_check", "rcupdate.rcu_expedited=1", "cryptomgr.notests", "noreplace-smp", "reboot=t",
        "net.ifnames=0", "initcall_blacklist=load_system_certificate_list,jent_mod_init",
        "i8042.direct=1", "i8042.dumbkbd=1", "i8042.nopnp=1", "i8042.noaux=1", "pci=lastbus=0",
        "8250.nr_uarts=1", "console=ttyS0", "quiet", "panic=-1", "nr_cpus=4", "selinux=0",
    )  # fmt: skip


def test_kernel_parameters_for_emulation_of_one_processor_skip_both_calibrations() -> None:
    parameters = kernel_parameters("microvm", "tcg", max_vcpus=1, tsc_khz=2445404)

    assert {"nolapic_timer", "tsc_early_khz=2445404", "pci=off"} <= set(parameters)


def test_kernel_parameters_for_emulation_of_several_processors_keep_their_timers() -> None:
    assert "nolapic_timer" not in kernel_parameters("q35", "tcg", max_vcpus=2)


def test_kernel_parameters_with_kvm_leave_clocks_to_it() -> None:
    parameters = kernel_parameters("q35", "kvm", max_vcpus=1, tsc_khz=2445404)

    assert {"nolapic_timer", "tsc_early_khz"}.isdisjoint(_names(parameters))


def test_kernel_parameters_of_debug_say_more() -> None:
    parameters = kernel_parameters("q35", "kvm", max_vcpus=1, debug=True)

    assert "debug" in parameters
    assert "quiet" not in parameters


def test_kernel_parameters_keep_their_order_console_root_verbosity_panic_processors_selinux() -> None:
    parameters = kernel_parameters(
        "q35", "tcg", max_vcpus=1, console="hvc0", root=("root=/dev/vda", "ro"), selinux=True
    )

    tail = parameters[parameters.index("console=hvc0") :]
    assert tail == ("console=hvc0", "root=/dev/vda", "ro", "quiet", "panic=-1", "nr_cpus=1", "selinux=1")
    assert "8250.nr_uarts=1" not in parameters


@pytest.mark.parametrize("machine", ["q35", "microvm"])
@pytest.mark.parametrize("accel", ["kvm", "tcg"])
def test_kernel_parameters_called_twice_are_the_same(machine: str, accel: str) -> None:
    first = kernel_parameters(machine, accel, max_vcpus=1)

    assert kernel_parameters(machine, accel, max_vcpus=1) == first
    assert len(set(_names(first))) == len(first)


def test_kernel_parameters_for_unknown_machine_raise() -> None:
    with pytest.raises(InvalidConfigError, match="q35, microvm"):
        kernel_parameters("pc", "tcg", max_vcpus=1)
