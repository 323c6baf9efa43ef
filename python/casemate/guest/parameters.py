"""The kernel parameters that a guest of ours is booted with. Pure; what each is worth is in ``docs/design/guest-assets.md``.

Order: machine and accelerator, console, root, verbosity, what to do on a panic, processors, SELinux; the user's come after.
"""

from __future__ import annotations

from collections.abc import Sequence

from casemate.errors import InvalidConfigError

__all__ = ["kernel_parameters"]

_ALL = (
    # The VMM's clock needs no watchdog, and its timer interrupt is wired as told.
    "tsc=reliable",
    "no_timer_check",
    "rcupdate.rcu_expedited=1",
    # Distribution kernels test each cipher as it comes: the largest part of their boot that nobody needs.
    "cryptomgr.notests",
    "noreplace-smp",
    # A triple fault ends the VM on every machine type; the keyboard controller is not there on all.
    "reboot=t",
    "net.ifnames=0",
)
_Q35 = ("i8042.direct=1", "i8042.dumbkbd=1", "i8042.nopnp=1", "i8042.noaux=1", "pci=lastbus=0")
_MACHINES = ("q35", "microvm")

# Boot-time work for things that nothing in the guest uses: keys for module signatures, which our initrd's modules do not
# carry, and a random number source for the kernel's own ciphers that measures time and finds none on an emulator.
_SKIPPED_INITCALLS = ("load_system_certificate_list", "jent_mod_init")


def kernel_parameters(
    machine: str,
    accel: str,
    *,
    max_vcpus: int,
    debug: bool = False,
    tsc_khz: int | None = None,
    console: str = "ttyS0",
    root: Sequence[str] = (),
    selinux: bool = False,
) -> tuple[str, ...]:
    """Parameters for a guest, in order.

    Args:
        machine: ``q35`` or ``microvm``.
        accel: ``kvm`` or ``tcg``.
        max_vcpus: The most that the guest may come to have, hot-plugged ones included.
        debug: Kernel messages on the console; slows the boot.
        tsc_khz: Rate of the host's time stamp counter, which an emulated guest sees as it is; spares it the calibration. A
            microvm has no second clock to calibrate by and can hang on a busy host without it.
        console: Where the kernel's messages go.
        root: Parameters that name the root file system, for a disk image.
        selinux: Whether SELinux is on in the guest.

    Raises:
        InvalidConfigError: Unknown machine type.
    """
    if machine not in _MACHINES:
        raise InvalidConfigError(
            f"machine is {machine!r}, one of {', '.join(_MACHINES)} is expected", path="machine"
        )
    parameters = list(_ALL)
    parameters.append(f"initcall_blacklist={','.join(_SKIPPED_INITCALLS)}")
    # A microvm of ours has no PCI: looking for it costs a good part of its boot.
    parameters += _Q35 if machine == "q35" else ("pci=off",)
    if accel == "tcg":
        parameters += _emulated(max_vcpus, tsc_khz)
    if console.startswith("ttyS"):
        parameters.append("8250.nr_uarts=1")
    parameters.append(f"console={console}")
    parameters += root
    parameters.append("debug" if debug else "quiet")
    # The VMM does not restart: a panic ends the VM at once, with its text on the console.
    parameters.append("panic=-1")
    parameters.append(f"nr_cpus={max_vcpus}")
    parameters.append(f"selinux={int(selinux)}")
    return tuple(parameters)


def _emulated(max_vcpus: int, tsc_khz: int | None) -> list[str]:
    parameters = []
    if max_vcpus == 1:
        # Its calibration takes 100 ms of waiting; with one processor the platform's timer serves as well.
        parameters.append("nolapic_timer")
    if tsc_khz:
        parameters.append(f"tsc_early_khz={tsc_khz}")
    return parameters
