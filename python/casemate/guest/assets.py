"""What a guest boots from: :func:`resolve` turns a wish (a series, a path, nothing) into checked files.

With everything in the cache this is a few small reads, and imports nothing more; whatever makes something is imported when
there is something to make.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest.store import KernelEntry, Store

if TYPE_CHECKING:
    from casemate.config.settings import Settings
    from casemate.guest.apt import Progress

__all__ = ["ChosenKernel", "FileDigest", "GuestAssets", "agent_path", "resolve"]

MACHINES = ("q35", "microvm")
INITRD_VERSION = 1
"""Part of an initrd's name; changes whenever the same inputs would give another content."""

_AUTO = "auto"
_SERIES = re.compile(r"\d+\.\d+")


class GuestAssets(msgspec.Struct, frozen=True, kw_only=True):
    """Files that a guest boots from, all checked.

    Args:
        kernel: vmlinux or bzImage.
        initrd: None only with a disk ``image``.
        kernel_release: As in ``uname -r``; empty when a user's kernel does not say.
        kernel_source: Where it came from, for people.
        initrd_bytes: Length of the initrd, 0 without one.
        modules: Names of the modules in an initrd of ours.
        agent: ``casemate`` when the guest's PID 1 is ours, ``unknown`` with a user's own initrd or image.
        image: A user's disk image with an agent of its own.
    """

    kernel: Path
    initrd: Path | None
    kernel_release: str
    kernel_source: str
    initrd_bytes: int
    modules: tuple[str, ...]
    agent: Literal["casemate", "unknown"]
    image: Path | None = None


class FileDigest(msgspec.Struct, frozen=True):
    """SHA-256 of a file, in hexadecimal."""

    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileDigest:
        """Digest of the file ``path``. Blocks: for reading it."""
        import hashlib

        with path.open("rb") as stream:
            return cls(hashlib.file_digest(stream, "sha256").hexdigest())


class _InitrdFacts(msgspec.Struct, frozen=True):
    whole: bool


class _ImageFacts(msgspec.Struct, frozen=True):
    form: str


class ChosenKernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel that was chosen: what goes into the initrd's key, and where its modules may be."""

    id: str
    path: Path
    release: str
    source: str
    modules: tuple[Path, ...]
    config: str = ""


def agent_path() -> Path:
    """The static guest agent that came with this installation.

    Raises:
        UnsupportedError: It was installed without one.
    """
    path = Path(__file__).parent.parent / "_bin" / "casemate-agent"
    if not path.is_file():
        raise UnsupportedError(
            "casemate was installed without the guest agent: install a wheel, or rebuild with the Rust target"
            f" x86_64-unknown-linux-musl present (expected at {path})",
            capability="guest agent",
        )
    return path


def resolve(
    kernel: str | os.PathLike[str] | None = None,
    initrd: str | os.PathLike[str] | None = None,
    *,
    machine: str,
    settings: Settings,
    image: str | os.PathLike[str] | None = None,
    agent: Path | None = None,
    progress: Progress | None = None,
    refresh: bool = False,
) -> GuestAssets:
    """Find, or make, the files that a guest boots from.

    Args:
        kernel: None or ``auto``: the newest series there is; ``6.12``: the newest of that series; else a path to a vmlinux,
            bzImage or kernel ``.deb``.
        initrd: None or ``auto``: ours; else a path.
        machine: ``q35`` or ``microvm``; decides which modules go in.
        image: Path of a disk image whose own init starts an agent; then there is no initrd unless one is given.
        agent: Program to put in as ``/init``; the one of this installation by default.
        progress: Told of downloads, ``(step, done, total)``.
        refresh: Look for a newer kernel of the series though one is cached.

    Raises:
        InvalidConfigError: Unknown series or machine; a file that is missing, cut short or not what it should be.
        UnsupportedError: No kernel or agent can be had, or the kernel lacks what a guest needs; the text has the cure.
        HostError, ResourceExhaustedError: The cache can't be written.
    Blocks: not noticeably with everything cached (under 5 ms); else for download and building.
    """
    if machine not in MACHINES:
        raise InvalidConfigError(
            f"machine is {machine!r}, one of {', '.join(MACHINES)} is expected", path="machine"
        )
    store = Store(settings.cache_root / "guest")
    # Cheap checks of what the user gave come before anything that may download.
    own_initrd = _user_initrd(store, initrd)
    own_image = _user_image(store, image)
    needs_agent = own_initrd is None and own_image is None
    program = (agent or agent_path()) if needs_agent else None
    chosen = _choose(store, kernel, machine, settings.timeout_factor, progress, refresh)
    assets = GuestAssets(
        kernel=chosen.path,
        initrd=own_initrd,
        kernel_release=chosen.release,
        kernel_source=chosen.source,
        initrd_bytes=own_initrd.stat().st_size if own_initrd else 0,
        modules=(),
        agent="unknown",
        image=own_image,
    )
    if program is None:
        return assets
    return _with_own_initrd(assets, store, chosen, program, machine, settings.timeout_factor)


def _user_initrd(store: Store, initrd: str | os.PathLike[str] | None) -> Path | None:
    if initrd is None or initrd == _AUTO:
        return None
    path = Path(initrd).absolute()

    def check() -> _InitrdFacts:
        from casemate.guest.formats import check_initrd

        check_initrd(path)
        return _InitrdFacts(True)

    store.facts(path, _InitrdFacts, check)
    return path


def _user_image(store: Store, image: str | os.PathLike[str] | None) -> Path | None:
    if image is None:
        return None
    path = Path(image).absolute()

    def check() -> _ImageFacts:
        from casemate.guest.formats import check_disk_image

        return _ImageFacts(check_disk_image(path))

    store.facts(path, _ImageFacts, check)
    return path


def _choose(
    store: Store,
    kernel: str | os.PathLike[str] | None,
    machine: str,
    timeout_factor: float,
    progress: Progress | None,
    refresh: bool,
) -> ChosenKernel:
    wanted = _AUTO if kernel is None else os.fspath(kernel)
    if wanted == _AUTO or _SERIES.fullmatch(wanted):
        entry = None if refresh else store.read_current(wanted)
        if entry is None:
            from casemate.guest.kernel import ensure_kernel

            entry = ensure_kernel(
                store,
                wanted,
                machine=machine,
                timeout_factor=timeout_factor,
                progress=progress,
                refresh=refresh,
            )
        return _of_entry(store, entry)
    if "/" not in wanted and not isinstance(kernel, os.PathLike) and not Path(wanted).exists():
        raise InvalidConfigError(
            f"kernel is {wanted!r}: auto, a series such as 6.12, or the path of a kernel is expected",
            path="kernel",
        )
    from casemate.guest.user_kernel import choose_user_kernel

    return choose_user_kernel(store, Path(wanted).absolute(), timeout_factor)


def _of_entry(store: Store, entry: KernelEntry) -> ChosenKernel:
    directory = store.kernel_directory(entry.id)
    return ChosenKernel(
        id=entry.id,
        path=directory / entry.kernel,
        release=entry.release,
        source=entry.source,
        modules=(directory / "modules",),
    )


def _with_own_initrd(
    assets: GuestAssets,
    store: Store,
    chosen: ChosenKernel,
    program: Path,
    machine: str,
    timeout_factor: float,
) -> GuestAssets:
    agent_digest = store.facts(program, FileDigest, lambda: FileDigest.of(program)).sha256
    key = f"{chosen.id}-{machine}-{agent_digest[:32]}-v{INITRD_VERSION}"
    record = store.read_initrd(key)
    if record is None:
        from casemate.guest.build import make_initrd

        record = make_initrd(store, key, chosen, program, machine, timeout_factor)
    return msgspec.structs.replace(
        assets,
        initrd=store.initrd_path(key),
        initrd_bytes=record.initrd_bytes,
        modules=record.modules,
        agent="casemate",
    )
