"""Make what :func:`casemate.guest.resolve` did not find in the cache: an initrd for one kernel, machine and agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from casemate.errors import HostError, InvalidConfigError
from casemate.guest import elf, modules
from casemate.guest.assets import ChosenKernel
from casemate.guest.initrd import build_initrd, check_agent
from casemate.guest.store import InitrdRecord, Store
from casemate.guest.tree import empty_tree, open_tree

__all__ = ["make_initrd"]

_LOCK_DEADLINE_S = 120.0


def make_initrd(
    store: Store, key: str, kernel: ChosenKernel, agent: Path, machine: str, timeout_factor: float
) -> InitrdRecord:
    """Build the initrd ``key`` and put it into the cache, unless another process has just done so.

    Raises:
        UnsupportedError: The kernel lacks a module that a guest needs, or the agent can't be PID 1.
        InvalidConfigError: A module is damaged.
        HostError: The agent can't be read, or the cache can't be written.
    Blocks: for the building, under a second, and while another process makes the same.
    """
    with store.lock("initrd", deadline_s=_LOCK_DEADLINE_S * timeout_factor):
        known = store.read_initrd(key)
        if known is not None:
            return known
        try:
            program = agent.read_bytes()
        except OSError as exc:
            raise HostError(
                f"the guest agent {agent} can't be read: {exc.strerror}",
                errno=exc.errno or 0,
                target=str(agent),
            ) from exc
        check_agent(program, path=str(agent))
        tree, read_module = _open(kernel)
        try:
            plan = modules.plan_modules(modules.module_set(machine), tree)
            archive = build_initrd(program, plan, read_module)
        except elf.ElfError as exc:
            raise InvalidConfigError(
                f"a module of kernel {kernel.release} is damaged: {exc}", path="kernel"
            ) from exc
        record = InitrdRecord(
            key=key,
            initrd_bytes=len(archive),
            modules=tuple(module.name for module in plan.all),
            kernel_id=kernel.id,
            machine=machine,
        )
        return store.publish_initrd(record, archive)


def _open(kernel: ChosenKernel) -> tuple[modules.ModuleTree, Callable[[str], bytes]]:
    directory = next((directory for directory in kernel.modules if directory.is_dir()), None)
    if directory is None:
        return empty_tree(kernel.release, kernel.config), _no_module
    disk = open_tree(directory, kernel.release, config=kernel.config)
    return disk.tree(), disk.read_trimmed


def _no_module(path: str) -> bytes:
    raise InvalidConfigError(f"there is no module {path} in a kernel without modules", path="kernel")
