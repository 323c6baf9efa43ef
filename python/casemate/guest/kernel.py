"""Bring a kernel into the cache: from a package, from the host, or unpacked from a user's bzImage."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest import elf, host, vmlinux
from casemate.guest.apt import Apt, AptKernel, Progress, choose_kernel, version_key
from casemate.guest.deb import unpack_deb
from casemate.guest.store import KernelEntry, Store

__all__ = ["AUTO", "add_bzimage", "add_deb", "add_from_host", "ensure_kernel"]

AUTO = "auto"
_LOCK_DEADLINE_S = 1800.0
_UNPACK_DEADLINE_S = 300.0


def ensure_kernel(
    store: Store,
    wanted: str,
    *,
    machine: str,
    timeout_factor: float = 1.0,
    progress: Progress | None = None,
    refresh: bool = False,
    apt: Apt | None = None,
) -> KernelEntry:
    """The kernel that ``wanted`` (a series, or ``auto``) stands for, fetched when it is not in the cache.

    Args:
        machine: For the choice among the host's own kernels.
        refresh: Look for a newer one though there is one.
        apt: Where packages come from; this host's by default.

    Raises:
        InvalidConfigError: Nobody offers that series.
        UnsupportedError: No kernel can be had; the text says what to do.
        HostError: The cache can't be written.
    Blocks: for the download, and while another process makes the same.
    """
    with store.lock("kernel", deadline_s=_LOCK_DEADLINE_S * timeout_factor):
        known = store.read_current(wanted)
        if known is not None and not refresh:
            return known
        if apt is None and not Apt.is_installed():
            entry = _ensure_without_packages(store, wanted, machine)
        else:
            apt = apt or Apt(timeout_factor=timeout_factor, progress=progress)
            try:
                entry = _ensure_from_apt(store, wanted, apt, timeout_factor)
            except UnsupportedError:
                # Offline, or no lists: an older kernel that is here already still does for "auto".
                cached = _newest(store) if wanted == AUTO and not refresh else None
                if cached is None:
                    raise
                entry = cached
        store.write_current(wanted, entry.id)
        return entry


def _newest(store: Store) -> KernelEntry | None:
    entries = [entry for entry in store.list_kernels() if entry.source.startswith("package ")]
    return max(entries, key=lambda entry: version_key(entry.release), default=None)


def _ensure_without_packages(store: Store, wanted: str, machine: str) -> KernelEntry:
    if wanted != AUTO:
        raise UnsupportedError(
            f"kernel series {wanted} can't be fetched: this host has no package manager that is known (apt);"
            " give a kernel by path",
            capability="kernel package",
        )
    return add_from_host(store, machine)


def _ensure_from_apt(store: Store, wanted: str, apt: Apt, timeout_factor: float) -> KernelEntry:
    series = None if wanted == AUTO else wanted
    chosen = choose_kernel(apt.list_kernels(), series)
    try:
        return _add_package(store, chosen, apt, timeout_factor)
    except UnsupportedError as exc:
        # Lists that are older than the archive name packages that are gone.
        if not apt.refresh("the package lists are out of date"):
            exc.add_note("if the package lists are old, run: sudo apt-get update")
            raise
    return _add_package(store, choose_kernel(apt.list_kernels(), series), apt, timeout_factor)


def _add_package(store: Store, chosen: AptKernel, apt: Apt, timeout_factor: float) -> KernelEntry:
    known = store.read_kernel(chosen.id)
    if known is not None:
        return known
    with store.staging("kernel") as staging:
        packages = staging / "packages"
        packages.mkdir()
        files = apt.download(chosen, packages)
        return _publish_unpacked(
            store, staging, files, f"package {chosen.package} {chosen.version}", chosen.id, timeout_factor
        )


def add_deb(store: Store, package: Path, digest: str, *, timeout_factor: float = 1.0) -> KernelEntry:
    """Put the kernel of a ``.deb`` file, whose SHA-256 is ``digest``, into the cache."""
    kernel_id = f"deb-{digest[:32]}"
    with store.lock("kernel", deadline_s=_LOCK_DEADLINE_S * timeout_factor):
        known = store.read_kernel(kernel_id)
        if known is not None:
            return known
        with store.staging("kernel") as staging:
            return _publish_unpacked(
                store, staging, (package,), f"package {package}", kernel_id, timeout_factor
            )


def _publish_unpacked(
    store: Store, staging: Path, files: tuple[Path, ...], source: str, kernel_id: str, timeout_factor: float
) -> KernelEntry:
    unpacked, made = staging / "unpacked", staging / "made"
    made.mkdir()
    for file in files:
        unpack_deb(file, unpacked, deadline_s=_UNPACK_DEADLINE_S * timeout_factor)
    images = sorted((unpacked / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise InvalidConfigError(f"{source} holds {len(images)} kernels, one is expected", path="kernel")
    release = images[0].name.removeprefix("vmlinuz-")
    images[0].rename(made / "vmlinuz")
    config = unpacked / "boot" / f"config-{release}"
    if config.is_file():
        config.rename(made / "config")
    trees = [unpacked / base / "lib/modules" / release for base in ("", "usr")]
    tree = next((tree for tree in trees if tree.is_dir()), None)
    if tree is not None:
        tree.rename(made / "modules")
    return _publish(store, made, release=release, source=source, kernel_id=kernel_id)


def _publish(store: Store, made: Path, *, release: str, source: str, kernel_id: str) -> KernelEntry:
    """Add the uncompressed kernel where that can be had and entered, and move the directory into the cache."""
    name = "vmlinuz"
    try:
        content = vmlinux.extract_vmlinux((made / name).read_bytes(), path=source)
    except UnsupportedError:
        content = b""  # packed in a way that only the kernel's own unpacker knows: it boots, a little slower
    if content and elf.find_pvh_entry(content) is not None:
        name = "vmlinux"
        (made / name).write_bytes(content)
    return store.publish_kernel(
        made,
        KernelEntry(
            id=kernel_id,
            release=release,
            source=source,
            kernel=name,
            kernel_bytes=(made / name).stat().st_size,
            made_at_s=int(time.time()),
        ),
    )


def add_bzimage(
    store: Store, image: Path, release: str, digest: str, *, timeout_factor: float = 1.0
) -> KernelEntry:
    """Put a user's bzImage, whose SHA-256 is ``digest``, unpacked into the cache; without modules."""
    kernel_id = f"file-{digest[:32]}"
    with store.lock("kernel", deadline_s=_LOCK_DEADLINE_S * timeout_factor):
        known = store.read_kernel(kernel_id)
        if known is not None:
            return known
        with store.staging("kernel") as staging:
            made = staging / "made"
            made.mkdir()
            shutil.copyfile(image, made / "vmlinuz")
            return _publish(store, made, release=release, source=f"file {image}", kernel_id=kernel_id)


def add_from_host(store: Store, machine: str) -> KernelEntry:
    """Put this host's own kernel and its modules into the cache; the caller holds the lock.

    Raises:
        UnsupportedError: None of them can serve a guest; the text says what is missing.
    """
    found = host.find_host_kernel(machine=machine)
    digest = hashlib.sha256(found.image.read_bytes()).hexdigest()
    with store.staging("kernel") as staging:
        made = staging / "made"
        made.mkdir()
        shutil.copyfile(found.image, made / "vmlinuz")
        if found.config:
            (made / "config").write_text(found.config)
        if found.modules is not None:
            shutil.copytree(found.modules, made / "modules", symlinks=True)
        return _publish(
            store, made, release=found.release, source=f"host {found.image}", kernel_id=f"host-{digest[:32]}"
        )
