"""A kernel that the user gives by path: checked, unpacked when that makes it boot faster, its modules looked for."""

from __future__ import annotations

from pathlib import Path

import msgspec

from casemate.guest.assets import ChosenKernel, FileDigest
from casemate.guest.deb import AR_MAGIC
from casemate.guest.formats import KernelFile, check_kernel, open_mapped
from casemate.guest.kernel import add_bzimage, add_deb
from casemate.guest.store import KernelEntry, Store

__all__ = ["choose_user_kernel"]


class _Form(msgspec.Struct, frozen=True):
    is_package: bool


def choose_user_kernel(store: Store, path: Path, timeout_factor: float) -> ChosenKernel:
    """The kernel at ``path``: a vmlinux as it is, a bzImage or a ``.deb`` unpacked into the cache.

    Raises:
        InvalidConfigError: Missing, cut short, or no kernel; ``path`` of the error is ``kernel``.
        HostError: It can't be read, or the cache can't be written.
    Blocks: for reading it the first time, 0.1 to 3 s.
    """
    form = store.facts(path, _Form, lambda: _find_form(path))
    if form.is_package:
        entry = add_deb(store, path, _digest(store, path), timeout_factor=timeout_factor)
        directory = store.kernel_directory(entry.id)
        return _chosen(store, entry, (directory / "modules",))
    facts = store.facts(path, KernelFile, lambda: check_kernel(path))
    digest = _digest(store, path)
    directories = _module_directories(store, path, facts.release)
    if facts.form == "bzimage":
        entry = add_bzimage(store, path, facts.release, digest, timeout_factor=timeout_factor)
        unpacked = store.kernel_path(entry)
        config = store.facts(unpacked, KernelFile, lambda: check_kernel(unpacked)).config
        return _chosen(store, entry, directories, config)
    return ChosenKernel(
        id=_id(f"file-{digest[:32]}", directories),
        path=path,
        release=facts.release,
        source=f"file {path}",
        modules=directories,
        config=facts.config,
    )


def _find_form(path: Path) -> _Form:
    with open_mapped(path, field="kernel") as data:
        return _Form(data[: len(AR_MAGIC)] == AR_MAGIC)


def _digest(store: Store, path: Path) -> str:
    return store.facts(path, FileDigest, lambda: FileDigest.of(path)).sha256


def _chosen(store: Store, entry: KernelEntry, modules: tuple[Path, ...], config: str = "") -> ChosenKernel:
    return ChosenKernel(
        id=_id(entry.id, modules),
        path=store.kernel_path(entry),
        release=entry.release,
        source=entry.source,
        modules=modules,
        config=config,
    )


def _module_directories(store: Store, path: Path, release: str) -> tuple[Path, ...]:
    """Where modules of a kernel of this release may be: beside it, on the host, in the cache."""
    if not release:
        return ()
    beside = (path.parent / "modules", path.parent / "lib/modules" / release, Path("/lib/modules") / release)
    cached = (
        store.kernel_directory(entry.id) / "modules"
        for entry in store.list_kernels()
        if entry.release == release
    )
    return tuple(directory for directory in (*beside, *cached) if directory.is_dir())[:1]


def _id(base: str, directories: tuple[Path, ...]) -> str:
    """The kernel's part of an initrd's name: another set of modules makes another initrd."""
    if not directories:
        return base
    status = directories[0].stat()
    return f"{base}-{status.st_ino:x}-{status.st_mtime_ns:x}"
