"""The initrd that a guest starts from: the agent as ``/init``, the kernel modules it loads, and nothing else.

It is not compressed: the guest would pay for unpacking it, and the host keeps it in its page cache anyway.

``/lib/casemate/modules.list`` has one line a module that is always loaded, ``/lib/casemate/modules.demand`` one a module that is
loaded when a device asks for it: ``<file name> <file names it needs, by comma, or ->``, each after those that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from casemate.errors import UnsupportedError
from casemate.guest import cpio, elf
from casemate.guest.modules import ModulePlan, PlannedModule

__all__ = ["build_initrd", "check_agent", "modules_list"]

_MODULES_DIRECTORY = "lib/casemate/modules"


def modules_list(planned: Iterable[PlannedModule]) -> str:
    """The text that tells the agent what to load: file name and what it needs, in loading order."""
    return "".join(f"{module.file_name} {','.join(module.depends) or '-'}\n" for module in planned)


def check_agent(agent: bytes, *, path: str) -> None:
    """Refuse an agent that can't be PID 1 of an otherwise empty root.

    Raises:
        UnsupportedError: Not an x86-64 ELF program, or one that needs a dynamic linker.
    """
    try:
        linked = elf.has_interpreter(agent)
        needed = elf.required_bytes(agent)
    except elf.ElfError as exc:
        raise UnsupportedError(f"{path} can't be the guest agent: {exc}", capability="guest agent") from exc
    if needed > len(agent):
        raise UnsupportedError(
            f"{path} can't be the guest agent: {len(agent)} bytes, {needed} expected",
            capability="guest agent",
        )
    if linked:
        raise UnsupportedError(
            f"{path} can't be the guest agent: it needs a dynamic linker, a static program is expected",
            capability="guest agent",
        )


def build_initrd(agent: bytes, plan: ModulePlan, read_module: Callable[[str], bytes]) -> bytes:
    """The uncompressed cpio archive; the same inputs give the same bytes.

    Args:
        agent: The static agent program.
        plan: Modules to put in.
        read_module: Returns the uncompressed content of a planned module's ``path``.
    """
    directories = (
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "etc",
        "mnt",
        "root",
        "lib",
        "lib/casemate",
        _MODULES_DIRECTORY,
    )
    members = [cpio.directory(name, 0o1777 if name == "tmp" else 0o755) for name in directories]
    members += [
        cpio.node("dev/console", 5, 1),
        cpio.node("dev/null", 1, 3, 0o666),
        cpio.file("init", agent, 0o755),
    ]
    members.append(cpio.file("lib/casemate/modules.list", modules_list(plan.boot + plan.rootfs).encode()))
    members.append(cpio.file("lib/casemate/modules.demand", modules_list(plan.demand).encode()))
    members += [
        cpio.file(f"{_MODULES_DIRECTORY}/{module.file_name}", read_module(module.path)) for module in plan.all
    ]
    return cpio.write(members)
