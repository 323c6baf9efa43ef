"""The host's own kernel as the guest's, for hosts without a package manager that we know: only when it suffices, checked."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from casemate.errors import CasemateError, UnsupportedError
from casemate.guest import formats, modules
from casemate.guest.apt import version_key
from casemate.guest.tree import DiskTree, empty_tree

__all__ = ["HostKernel", "find_host_kernel"]


class HostKernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel of this host: its image, its modules (None: all is built in), its configuration's text."""

    release: str
    image: Path
    modules: Path | None
    config: str


def find_host_kernel(
    *,
    machine: str,
    boot: Path = Path("/boot"),
    modules_root: Path = Path("/lib/modules"),
    running: str | None = None,
) -> HostKernel:
    """The running kernel if it can serve a guest on ``machine``, else the newest installed one that can.

    Args:
        running: Release that is tried first; this host's by default.

    Raises:
        UnsupportedError: None can; the text says what each lacks.
    Blocks: for reading directories and a few modules.
    """
    running = os.uname().release if running is None else running
    images = {path.name.removeprefix("vmlinuz-"): path for path in boot.glob("vmlinuz-*")}
    for directory in modules_root.glob("*"):
        if (directory / "vmlinuz").is_file():  # where a distribution keeps /boot for the boot loader alone
            images.setdefault(directory.name, directory / "vmlinuz")
    if not images:
        raise UnsupportedError(
            f"no kernel at {boot}/vmlinuz-* and no package manager that is known; give one by path"
            " (--kernel /path/to/vmlinux)",
            capability="guest kernel",
        )
    reasons = []
    for release in sorted(images, key=lambda name: (name == running, version_key(name)), reverse=True):
        try:
            return _check(release, images[release], boot, modules_root, machine)
        except CasemateError as exc:
            reasons.append(f"{release}: {exc}")
    raise UnsupportedError(
        "no kernel of this host can serve as the guest's: " + "; ".join(reasons), capability="guest kernel"
    )


def _check(release: str, image: Path, boot: Path, modules_root: Path, machine: str) -> HostKernel:
    formats.check_kernel(image)
    config_path = next(
        (path for path in (boot / f"config-{release}", modules_root / release / "config") if path.is_file()),
        None,
    )
    config = config_path.read_text("utf-8", "replace") if config_path else ""
    directory = modules_root / release
    if not directory.is_dir():
        if not config:
            raise UnsupportedError(f"neither {directory} nor a configuration", capability="kernel modules")
        modules.plan_modules(modules.module_set(machine), empty_tree(release, config))
        return HostKernel(release=release, image=image, modules=None, config=config)
    modules.plan_modules(modules.module_set(machine), DiskTree(directory, release, config=config).tree())
    return HostKernel(release=release, image=image, modules=directory, config=config)
