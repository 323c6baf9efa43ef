"""QEMU's command line for the lab. Pure."""

from __future__ import annotations

from pathlib import Path

import msgspec

__all__ = ["CONSOLE_FD", "JOB_FD", "Machine", "command_line"]

CONSOLE_FD = 3
JOB_FD = 4


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the lab.

    Args:
        qemu: Its binary.
        kernel: Uncompressed kernel.
        root: ext4 image; what is written to it is gone with the machine.
        job: Disk with the job's files, a tar archive.
        results: Disk that takes the job's results, a tar archive.
        limit_s: The job's time; the machine ends it by itself.
        shell: The job talks to a person.
        vcpus: Processors. More than one are no faster, they take turns.
        memory_mib: Four guests of 512 MiB fit into the default.
    """

    qemu: str
    kernel: Path
    root: Path
    job: Path
    results: Path
    limit_s: int
    shell: bool = False
    vcpus: int = 1
    memory_mib: int = 4096


def command_line(machine: Machine) -> list[str]:
    """QEMU's arguments; the console's and the job's sockets are its descriptors 3 and 4."""
    parameters = [
        "root=/dev/nvme0n1",
        "rootfstype=ext4",
        "rootwait",
        "rw",
        "init=/init",
        "console=ttyS0",
        "quiet",
        "panic=-1",
        "mitigations=off",
        "net.ifnames=0",
        "cryptomgr.notests",
        f"casemate_lab.limit_s={machine.limit_s}",
        f"casemate_lab.shell={int(machine.shell)}",
    ]
    return [
        machine.qemu,
        *("-name", "casemate-lab"),
        # An interrupt controller in QEMU itself: the guests' one is the lab's kernel's, and emulation knows no other.
        *("-machine", "q35,kernel-irqchip=off,sata=off,smbus=off,vmport=off,dump-guest-core=off"),
        # One thread for all processors: with one each QEMU 7.2 can keep translated code that the kernel has just patched,
        # and the lab dies of a stale breakpoint (docs/design/qemu-driver.md).
        *("-accel", "tcg,thread=single,tb-size=512"),
        *("-cpu", "EPYC,+svm"),
        *("-smp", str(machine.vcpus)),
        *("-m", f"{machine.memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-chardev", f"socket,id=console,fd={CONSOLE_FD}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=job,fd={JOB_FD}"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=job"),
        *("-device", "virtio-rng-pci"),
        # The one disk for which the kernel has a driver of its own; its modules lie on it.
        *_disk("root", machine.root, "nvme", ",snapshot=on"),
        *_disk("job", machine.job, "virtio-blk-pci"),
        *_disk("results", machine.results, "virtio-blk-pci"),
        *("-kernel", str(machine.kernel)),
        *("-append", " ".join(parameters)),
    ]


def _disk(name: str, path: Path, device: str, options: str = "") -> tuple[str, ...]:
    file = str(path).replace(",", ",,")
    return (
        *("-drive", f"file={file},if=none,id={name},format=raw,cache=unsafe{options}"),
        *("-device", f"{device},drive={name},serial={name}"),
    )
