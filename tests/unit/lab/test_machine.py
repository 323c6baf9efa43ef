"""QEMU's command line for the lab."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.lab.machine import Machine, command_line

MACHINE = Machine(
    qemu="qemu",
    kernel=Path("/c/vmlinux"),
    root=Path("/c/a,b.ext4"),
    job=Path("/r/job.tar"),
    results=Path("/r/results.tar"),
    limit_s=77,
)


def values(machine: Machine, option: str) -> list[str]:
    words = command_line(machine)
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def test_command_line_when_rendered_then_processor_has_svm_and_accelerator_is_emulation() -> None:
    assert values(MACHINE, "-cpu") == ["EPYC,+svm"]
    assert values(MACHINE, "-accel")[0].startswith("tcg,")
    assert "kernel-irqchip=off" in values(MACHINE, "-machine")[0]


def test_command_line_when_rendered_then_only_the_root_is_temporary_and_commas_are_doubled() -> None:
    drives = values(MACHINE, "-drive")
    assert [drive.endswith("snapshot=on") for drive in drives] == [True, False, False]
    assert drives[0].startswith("file=/c/a,,b.ext4,")


def test_command_line_when_job_has_a_limit_then_the_lab_is_told() -> None:
    assert "casemate_lab.limit_s=77" in values(MACHINE, "-append")[0].split()
    assert "casemate_lab.shell=0" in values(MACHINE, "-append")[0].split()


def test_command_line_when_it_is_a_shell_then_the_lab_is_told() -> None:
    shell = msgspec.structs.replace(MACHINE, shell=True)
    assert "casemate_lab.shell=1" in values(shell, "-append")[0].split()
