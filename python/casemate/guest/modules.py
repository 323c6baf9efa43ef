"""Which kernel modules a guest needs, and in which order. Pure: what lies on disk comes in as a :class:`ModuleTree`.

A kernel package as it is unpacked has no ``modules.dep`` (its installation would make that), so dependencies are read from
the modules themselves; ``modules.dep``, where there is one, only says which of two files of one name counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest import elf

__all__ = [
    "MODULE_OPTIONS",
    "ModulePlan",
    "ModuleSet",
    "ModuleTree",
    "PlannedModule",
    "module_set",
    "normalise_name",
    "parse_builtin",
    "parse_config",
    "parse_modinfo",
    "parse_modules_dep",
    "plan_modules",
    "trim_module",
]

MODULE_OPTIONS: Mapping[str, str] = {
    "virtio_pci": "CONFIG_VIRTIO_PCI",
    "virtio_mmio": "CONFIG_VIRTIO_MMIO",
    "vmw_vsock_virtio_transport": "CONFIG_VIRTIO_VSOCKETS",
    "virtio_blk": "CONFIG_VIRTIO_BLK",
    "erofs": "CONFIG_EROFS_FS",
    "overlay": "CONFIG_OVERLAY_FS",
}
"""Kernel option behind each needed module, for kernels that come with a configuration but without ``modules.builtin``."""

_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_FIXED_BYTES = 12


class ModuleSet(msgspec.Struct, frozen=True):
    """Modules of one machine type by when they are needed.

    Args:
        boot: Before the agent can be reached: the virtio bus and vsock.
        rootfs: Before the first container's root filesystem can be mounted.
        demand: Loaded by the agent when a device or storage asks for it; may be missing from the kernel.
    """

    boot: tuple[str, ...]
    rootfs: tuple[str, ...]
    demand: tuple[str, ...]


_ROOTFS = ("virtio_blk", "erofs", "overlay")
_DEMAND = ("ext4", "virtio_net", "virtiofs", "virtio_console", "virtio_mem", "virtio_balloon", "virtio_rng")
_SETS = {
    "q35": ModuleSet(("virtio_pci", "vmw_vsock_virtio_transport"), _ROOTFS, _DEMAND),
    "microvm": ModuleSet(("virtio_mmio", "vmw_vsock_virtio_transport"), _ROOTFS, ("virtio_pci", *_DEMAND)),
}


def module_set(machine: str) -> ModuleSet:
    """The modules that a guest on ``machine`` needs.

    Raises:
        InvalidConfigError: Unknown machine type.
    """
    try:
        return _SETS[machine]
    except KeyError:
        known = ", ".join(sorted(_SETS))
        raise InvalidConfigError(
            f"machine is {machine!r}, one of {known} is expected", path="machine"
        ) from None


def normalise_name(text: str) -> str:
    """The kernel's name of a module from a file name or path: ``kernel/x/virtio-rng.ko.xz`` is ``virtio_rng``."""
    name = text.rsplit("/", 1)[-1]
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name.replace("-", "_")


def parse_modules_dep(text: str) -> dict[str, str]:
    """Path of each module by name, from ``modules.dep``. The first of two lines for one name counts."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        path, separator, _ = line.partition(":")
        if separator and path:
            paths.setdefault(normalise_name(path), path.strip())
    return paths


def parse_builtin(text: str) -> frozenset[str]:
    """Names of the modules that ``modules.builtin`` lists as built into the kernel."""
    return frozenset(normalise_name(line.strip()) for line in text.splitlines() if line.strip())


def parse_config(text: str) -> dict[str, str]:
    """Options that a kernel configuration sets, by name with ``CONFIG_``."""
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {name: value.strip() for name, separator, value in pairs if separator}


def parse_modinfo(module: bytes) -> tuple[str, ...]:
    """Names of the modules that ``module`` (uncompressed) needs first, by its ``depends`` and ``softdep`` fields.

    Raises:
        elf.ElfError: Not a whole kernel module.
    """
    section = next((section for section in elf.read_sections(module) if section.name == ".modinfo"), None)
    if section is None:
        raise elf.ElfError("no .modinfo section")
    raw = module[section.offset_bytes : section.offset_bytes + section.size_bytes]
    depends: list[str] = []
    for field in raw.split(b"\0"):
        key, _, value = field.decode("utf-8", "replace").partition("=")
        if key == "depends":
            depends += [name for name in value.split(",") if name]
        elif key == "softdep":
            # "pre: a b post: c": names may be crypto algorithms too, so a missing one is not an error (see plan_modules).
            before = value.partition("post:")[0].partition("pre:")[2]
            depends += [f"?{name}" for name in before.split()]
    return tuple(depends)


def trim_module(module: bytes) -> bytes:
    """``module`` without what a guest loads at a cost and does not use: its signature and its type information (BTF).

    A signature is checked by RSA whenever it is there, 3 to 10 ms each under emulation; these modules come from the same
    initrd as PID 1, so it proves nothing more. BTF is parsed at load time; hiding the section's name makes it skipped.

    Raises:
        elf.ElfError: Not a whole kernel module.
    """
    if module.endswith(_SIGNATURE_MAGIC):
        end = len(module) - len(_SIGNATURE_MAGIC)
        signature_bytes = int.from_bytes(module[end - 4 : end], "big")
        body_end = end - _SIGNATURE_FIXED_BYTES - signature_bytes
        if body_end <= 0:
            raise elf.ElfError(f"signature of {signature_bytes} bytes in a module of {len(module)}")
        module = module[:body_end]
    trimmed = bytearray(module)
    for section in elf.read_sections(module):
        if section.name == ".BTF":
            trimmed[section.name_offset_bytes : section.name_offset_bytes + 4] = b".btf"
    return bytes(trimmed)


class ModuleTree(msgspec.Struct, frozen=True, kw_only=True):
    """The modules of one kernel.

    Args:
        release: Kernel release, for error texts.
        paths: File of each loadable module by normalised name.
        builtin: Names of those that are part of the kernel.
        depends: Returns what a loadable module needs, as :func:`parse_modinfo` does.
    """

    release: str
    paths: Mapping[str, str]
    builtin: frozenset[str]
    depends: Callable[[str], Iterable[str]]

    def has(self, name: str) -> bool:
        """Whether the kernel has the module, loadable or built in."""
        return name in self.paths or name in self.builtin


class PlannedModule(msgspec.Struct, frozen=True):
    """One module to load: ``file_name`` in the initrd, ``path`` in the kernel's tree, file names that come first."""

    name: str
    file_name: str
    path: str
    depends: tuple[str, ...]


class ModulePlan(msgspec.Struct, frozen=True):
    """Modules in an order in which each comes after what it needs. ``demand`` holds none that are in the others."""

    boot: tuple[PlannedModule, ...]
    rootfs: tuple[PlannedModule, ...]
    demand: tuple[PlannedModule, ...]

    @property
    def all(self) -> tuple[PlannedModule, ...]:
        """All of them in loading order."""
        return self.boot + self.rootfs + self.demand


def plan_modules(wanted: ModuleSet, tree: ModuleTree) -> ModulePlan:
    """Dependency closure of ``wanted`` in loading order. Built-in modules are left out.

    Raises:
        UnsupportedError: Modules of ``boot`` or ``rootfs`` are not in the kernel; ``capability`` names them.
        InvalidConfigError: A module needs one that is not there, or itself.
    """
    missing = [name for name in map(normalise_name, wanted.boot + wanted.rootfs) if not tree.has(name)]
    if missing:
        listed = ", ".join(missing)
        raise UnsupportedError(
            f"kernel {tree.release} lacks {listed}, neither as a module nor built in; use another kernel"
            " (casemate guest build --kernel 6.12)",
            capability=listed,
        )
    seen: dict[str, PlannedModule] = {}
    stages = []
    for names in (wanted.boot, wanted.rootfs, wanted.demand):
        before = len(seen)
        for name in map(normalise_name, names):
            _add(name, tree, seen, chain=())
        stages.append(tuple(seen.values())[before:])
    return ModulePlan(*stages)


def _add(name: str, tree: ModuleTree, seen: dict[str, PlannedModule], chain: tuple[str, ...]) -> None:
    if name in seen or name not in tree.paths:
        return
    if name in chain:
        raise InvalidConfigError(
            f"modules of kernel {tree.release} need each other: {' -> '.join((*chain, name))}"
        )
    depends = []
    for entry in tree.depends(name):
        soft, needed = entry.startswith("?"), normalise_name(entry.removeprefix("?"))
        if soft and needed in (*chain, name):
            continue
        if not soft and not tree.has(needed):
            raise InvalidConfigError(
                f"module {name} of kernel {tree.release} needs {needed}, which is not there"
            )
        _add(needed, tree, seen, (*chain, name))
        if needed in seen:
            depends.append(seen[needed].file_name)
    seen[name] = PlannedModule(name, f"{name}.ko", tree.paths[name], tuple(depends))
