"""A plan as QEMU's command line, in one fixed order."""

from __future__ import annotations

from casemate.hypervisor.qemu.options import escape, render
from casemate.hypervisor.qemu.plan import VmPlan

__all__ = ["render_command_line"]

_SECCOMP = {"obsolete": "deny", "spawn": "deny", "resourcecontrol": "deny"}
_MEMORY_SLOTS = 10


def render_command_line(plan: VmPlan) -> list[str]:
    """The arguments of ``plan``, the program first. Does not block."""
    arguments = [plan.qemu, "-name", _name(plan), "-uuid", plan.uuid]
    arguments += ["-machine", render(plan.machine, plan.machine_options)]
    arguments += ["-accel", render(plan.accelerator.name, plan.accelerator_options)]
    # A CPU model carries its features behind commas of its own: it is not escaped.
    arguments += ["-cpu", plan.cpu]
    for chardev in plan.chardevs:
        arguments += chardev.arguments()
    arguments += ["-mon", "chardev=qmp,mode=control", "-serial", "chardev:console"]
    arguments += ["-m", _memory(plan)]
    if plan.memory is not None:
        arguments += plan.memory.arguments()
    arguments += plan.rng.arguments()
    for node in plan.nodes:
        arguments += node.arguments()
    for device in plan.devices:
        arguments += device.arguments()
    arguments += ["-rtc", "base=utc,driftfix=slew,clock=host"]
    if plan.accelerator.name == "kvm" and plan.machine == "q35":
        arguments += ["-global", "kvm-pit.lost_tick_policy=discard"]
    arguments += ["-vga", "none", "-display", "none", "-no-user-config", "-nodefaults", "-no-reboot"]
    arguments += ["-kernel", plan.assets.kernel]
    if plan.assets.initrd is not None:
        arguments += ["-initrd", plan.assets.initrd]
    if plan.assets.parameters:
        arguments += ["-append", " ".join(plan.assets.parameters)]
    if plan.seccomp:
        arguments += ["-sandbox", render("on", _SECCOMP)]
    arguments += ["-smp", _topology(plan)]
    return [*arguments, *plan.extra_arguments]


def _name(plan: VmPlan) -> str:
    name = escape(f"sandbox-{plan.sandbox_id}")
    return f"{name},debug-threads=on" if plan.debug else name


def _memory(plan: VmPlan) -> str:
    if plan.max_memory_mib == plan.memory_mib:
        return f"{plan.memory_mib}M"
    return f"{plan.memory_mib}M,slots={_MEMORY_SLOTS},maxmem={plan.max_memory_mib}M"


def _topology(plan: VmPlan) -> str:
    # One socket: the guest then knows that its CPUs share a cache and a memory node.
    return f"cpus={plan.vcpus},sockets=1,cores={plan.max_vcpus},threads=1,maxcpus={plan.max_vcpus}"
