"""Machines and kernels."""

from __future__ import annotations

import pytest

import casemate
from casemate import SandboxConfig, Settings, guest

pytestmark = [pytest.mark.root, pytest.mark.qemu]


@pytest.mark.parametrize("machine", ["q35", "microvm"])
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_run_when_machine_and_kernel_are_chosen_then_the_guest_is_that_one(
    busybox: str, settings: Settings, machine: str, kernel: str
) -> None:
    config = SandboxConfig(machine=machine, kernel=kernel)
    result = casemate.run(busybox, ["uname", "-r"], config=config, settings=settings)
    assert result.stdout.startswith(f"{kernel}.")
    assert result.guest_kernel == result.stdout.strip()


@pytest.mark.parametrize("machine", ["q35", "microvm"])
def test_run_when_a_hundred_megabytes_are_written_then_they_arrive_whole(
    busybox: str, settings: Settings, machine: str
) -> None:
    command = ["sh", "-c", "head -c 104857600 /dev/zero | tr '\\0' x"]
    result = casemate.run(busybox, command, config=SandboxConfig(machine=machine), settings=settings)
    assert len(result.stdout_bytes) == 104857600
    assert set(result.stdout_bytes) == {ord("x")}


def test_run_when_two_vcpus_are_asked_for_then_the_guest_has_two(busybox: str, settings: Settings) -> None:
    config = SandboxConfig(vcpus=2, memory_mib=384)
    result = casemate.run(
        busybox, ["sh", "-c", "nproc; grep MemTotal /proc/meminfo"], config=config, settings=settings
    )
    count, memory = result.stdout.splitlines()
    assert count == "2"
    assert 300_000 < int(memory.split()[1]) < 384 * 1024


def test_run_when_the_hostname_is_longer_than_a_guest_can_have_then_cut_to_64(
    busybox: str, settings: Settings
) -> None:
    hostname = "a" * 40 + "." + "b" * 39
    result = casemate.run(busybox, ["hostname"], config=SandboxConfig(hostname=hostname), settings=settings)
    assert result.stdout == f"{hostname[:64]}\n"


def test_run_when_the_initrd_is_a_users_own_then_its_agent_is_dialled(
    busybox: str, settings: Settings
) -> None:
    ours = guest.resolve(None, None, machine="q35", settings=settings)
    config = SandboxConfig(kernel=str(ours.kernel), initrd=str(ours.initrd))
    result = casemate.run(busybox, ["echo", "dialled"], config=config, settings=settings)
    assert (result.exit_code, result.stdout) == (0, "dialled\n")
