from __future__ import annotations

from pathlib import Path

import pytest

from casemate.errors import HostError
from casemate.hypervisor.host import parse_cpu_flags, parse_memory_mib, read_host_facts

CPUINFO = (
    "processor\t: 0\nvmx flags\t: ept\nflags\t\t: fpu vmx hypervisor\n\nprocessor\t: 1\nflags\t\t: svm\n"
)


def test_cpu_flags_when_cpuinfo_has_several_cpus_then_takes_the_first() -> None:
    assert parse_cpu_flags(CPUINFO) == {"fpu", "vmx", "hypervisor"}
    assert parse_cpu_flags("") == frozenset()


def test_memory_when_meminfo_is_whole_then_gives_mib() -> None:
    assert parse_memory_mib("MemTotal:       2097152 kB\nMemFree: 1 kB\n") == 2048


@pytest.mark.parametrize("text", ["", "MemTotal:", "MemTotal: x kB"])
def test_memory_when_meminfo_is_damaged_then_raises(text: str) -> None:
    with pytest.raises(HostError, match="MemTotal"):
        parse_memory_mib(text)


def test_host_facts_when_read_below_a_root_then_follow_its_files(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1048576 kB\n")
    (tmp_path / "sys" / "module" / "kvm_pvm").mkdir(parents=True)

    facts = read_host_facts(tmp_path)

    assert facts.memory_mib == 1024
    assert facts.pvm
    assert facts.has_hardware_virtualisation
    assert facts.is_nested
    assert "can't be opened: No such file" in facts.kvm_error


def test_host_facts_when_kvm_is_no_device_then_says_so(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("")
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1024 kB\n")
    (tmp_path / "dev" / "kvm").write_text("")

    assert "makes no VM" in read_host_facts(tmp_path).kvm_error


def test_host_facts_when_proc_is_missing_then_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="meminfo") as caught:
        read_host_facts(tmp_path)

    assert caught.value.target.endswith("/proc/meminfo")
