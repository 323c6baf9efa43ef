"""The lab's image: a kernel and a root file system of Debian packages, made once and kept outside the tree."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from casemate.errors import CasemateError
from casemate.guest import compression
from casemate.guest.command import run_command
from casemate.guest.kernel import ensure_kernel
from casemate.guest.modules import ModuleSet, ModuleTree, normalise_name, parse_modinfo, plan_modules
from casemate.guest.store import KernelEntry, Store
from tests.lab import LabError
from tests.lab.recipe import MODULES, PACKAGES, WATCHED, Recipe, image_key, parse_policy

__all__ = [
    "GUEST_CACHE",
    "KERNEL_SERIES",
    "LabImage",
    "ensure_image",
    "explain",
    "require_space",
    "run_group",
]

KERNEL_SERIES = "6.12"
GUEST_CACHE = "/var/cache/casemate-tests"
"""Where in the lab the cache of guest assets lies, with the kernel that its own guests boot."""

INIT = Path(__file__).with_name("init")
HOOKS = Path("/usr/share/mmdebstrap/hooks/merged-usr")
NEEDED_MIB = 2048
ROOT_MIB = 1536
BUILD_LIMIT_S = 900.0
TERM_S = 10.0
LOCK_LIMIT_S = 1200.0
NOT_NEEDED = ("doc", "man", "locale", "info", "lintian", "zoneinfo")

Say = Callable[[str], None]


class LabImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is whole.

    Args:
        key: Its name.
        python: Version of its Python, ``3.11``.
    """

    key: str
    kernel: Path
    root: Path
    python: str


class _Facts(msgspec.Struct, frozen=True):
    root_bytes: int
    python: str


def ensure_image(cache: Path, kernels: Path, *, timeout_factor: float, say: Say) -> LabImage:
    """The image of today's packages, made when it is not there; older ones are removed.

    Args:
        cache: Directory of the lab's own cache.
        kernels: Root of a cache of guest assets, with or without a kernel in it.

    Raises:
        LabError: It can't be made; nothing half-made is left.
    Blocks: about a minute when it has to be made.
    """
    store = Store(cache)
    try:
        kernel = ensure_kernel(Store(kernels), KERNEL_SERIES, machine="q35", timeout_factor=timeout_factor)
        with store.lock("image", deadline_s=LOCK_LIMIT_S * timeout_factor):
            return _ensure_locked(store, Store(kernels), kernel, timeout_factor, say)
    except CasemateError as error:
        raise LabError(f"the lab's image can't be made: {error}") from error


def _ensure_locked(
    store: Store, kernels: Store, kernel: KernelEntry, timeout_factor: float, say: Say
) -> LabImage:
    suite = _suite()
    key = image_key(Recipe(suite=suite, versions=_versions(), kernel_id=kernel.id, init=INIT.read_bytes()))
    directory = store.root / "images" / key
    known = _read(directory)
    if known is None:
        say(f"making the lab's image {key}; about a minute")
        require_space(store.root, NEEDED_MIB)
        with store.staging("image") as staging:
            _build(staging, suite, kernels, kernel, timeout_factor)
            directory.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(directory, ignore_errors=True)
            (staging / "made").rename(directory)
        known = _read(directory)
        assert known is not None
        for other in directory.parent.iterdir():
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)
    return LabImage(
        key=key,
        kernel=directory / "vmlinux",
        root=directory / "root.ext4",
        python=known.python,
    )


def _read(directory: Path) -> _Facts | None:
    try:
        facts = msgspec.json.decode((directory / "facts.json").read_bytes(), type=_Facts)
        whole = (directory / "root.ext4").stat().st_size == facts.root_bytes and (
            directory / "vmlinux"
        ).exists()
    except (OSError, msgspec.DecodeError):
        return None
    return facts if whole else None


def require_space(directory: Path, needed_mib: int) -> None:
    """Raise LabError when the file system of ``directory`` has less than ``needed_mib`` MiB free."""
    place = directory
    while not place.exists():
        place = place.parent
    free_mib = shutil.disk_usage(place).free >> 20
    if free_mib < needed_mib:
        raise LabError(
            f"the lab needs {needed_mib} MiB in {directory}, {free_mib} MiB are free:"
            " make room, or name another directory in CASEMATE_LAB_CACHE"
        )


def _build(staging: Path, suite: str, kernels: Store, kernel: KernelEntry, timeout_factor: float) -> None:
    """Make ``staging/made``."""
    _require_tools()
    made, extra = staging / "made", staging / "extra"
    made.mkdir()
    _write_extra(extra, kernels, kernel)
    finish = staging / "finish"
    finish.write_text(FINISH)
    finish.chmod(0o755)
    command = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(PACKAGES)}"]
    command += ['--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Retries "2"']
    if HOOKS.is_dir():
        command.append(f"--hook-dir={HOOKS}")
    # Put together where mmdebstrap has unpacked it, so that nothing is copied twice.
    command.append(f'--extract-hook={finish} "$1" {extra} {made} {kernel.release}')
    # Nothing mounted: nothing to unmount when it is killed, and nothing of this host in the image.
    command += ["--skip=chroot/mount", "--format=null", suite, "-", *_sources()]
    run_group(command, limit_s=BUILD_LIMIT_S * timeout_factor, scratch=staging)
    shutil.copyfile(kernels.kernel_path(kernel), made / "vmlinux")
    facts = _Facts((made / "root.ext4").stat().st_size, (made / "python").read_text("ascii").strip())
    (made / "facts.json").write_bytes(msgspec.json.encode(facts))


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise LabError(
            "the lab's image is made of packages with files of several owners: run ./dev lab build as root once"
        )
    for tool in ("mmdebstrap", "mke2fs", "chroot"):
        if shutil.which(tool) is None:
            raise LabError(f"{tool} is missing: ./dev setup installs it on Debian")


FINISH = f"""#!/bin/sh
# Run by mmdebstrap: puts our files in, makes what the packages' own scripts would have made, writes the image.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
root=$1 extra=$2 made=$3 release=$4
for name in {" ".join(NOT_NEEDED)}; do rm -rf "$root/usr/share/$name"; done
rm -rf "$root/var/cache/apt" "$root/var/lib/apt/lists" "$root/boot"
mkdir -p "$root/mnt"
cp -a "$extra/." "$root/"
chroot "$root" depmod "$release"
chroot "$root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' >"$made/python"
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$root" "$made/root.ext4" {ROOT_MIB}M
"""


def _write_extra(extra: Path, kernels: Store, kernel: KernelEntry) -> None:
    """The files of the image that come from no package: process 1, users, and the kernel, in a cache of guest assets."""
    guest = extra / GUEST_CACHE.lstrip("/") / "guest"
    home = guest / "kernels" / kernel.id
    home.parent.mkdir(parents=True)
    shutil.copytree(kernels.kernel_directory(kernel.id), home, symlinks=True)
    if kernel.kernel != "vmlinuz":
        (home / "vmlinuz").unlink()
    _unpack_modules(home / "modules", kernel.release)
    (guest / "current").mkdir()
    for name in ("auto", KERNEL_SERIES):
        (guest / "current" / name).symlink_to(f"../kernels/{kernel.id}")
    modules = extra / "usr/lib/modules" / kernel.release
    modules.parent.mkdir(parents=True)
    modules.symlink_to(f"{GUEST_CACHE}/guest/kernels/{kernel.id}/modules")
    shutil.copyfile(INIT, extra / "init")
    (extra / "init").chmod(0o755)
    etc = extra / "etc"
    (etc / "casemate-lab").mkdir(parents=True)
    (etc / "casemate-lab/modules").write_text("\n".join(MODULES) + "\n")
    (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (etc / "group").write_text("root:x:0:\ntty:x:5:\nkvm:x:106:\nnogroup:x:65534:\n")
    (etc / "hosts").write_text("127.0.0.1 localhost casemate-lab\n::1 localhost\n")


def _unpack_modules(tree: Path, release: str) -> None:
    """Unpack the modules that the lab loads when it starts, and what they need: xz is slow under emulation."""
    files = {normalise_name(path.name): path for path in sorted(tree.rglob("*.ko*"))}

    def content(name: str) -> bytes:
        data = files[name].read_bytes()
        if files[name].suffix != ".xz":
            return data
        return compression.decompress(data, form="xz", max_bytes=64 << 20)

    known = ModuleTree(
        release=release,
        paths={name: str(path) for name, path in files.items()},
        # What is not there is built in, as far as this is concerned: the lab's init names what can't be loaded.
        builtin=frozenset(map(normalise_name, MODULES)) - files.keys(),
        depends=lambda name: [entry for entry in parse_modinfo(content(name)) if entry.lstrip("?") in files],
    )
    for module in plan_modules(ModuleSet((), (), MODULES), known).demand:
        packed = files[module.name]
        if packed.suffix == ".xz":
            packed.with_suffix("").write_bytes(content(module.name))
            packed.unlink()


def _suite() -> str:
    release = platform.freedesktop_os_release()
    return release.get("VERSION_CODENAME", "bookworm") if release.get("ID") == "debian" else "bookworm"


def _sources() -> list[str]:
    """The host's own package sources where it is a Debian; mmdebstrap's default elsewhere."""
    if platform.freedesktop_os_release().get("ID") != "debian":
        return []
    candidates = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
    return [str(path) for path in candidates if path.exists()][:1]


def _versions() -> dict[str, str]:
    if shutil.which("apt-cache") is None:
        return {}
    return parse_policy(run_command(["apt-cache", "policy", *WATCHED], deadline_s=60).output)


def run_group(command: Sequence[str], *, limit_s: float, scratch: Path) -> None:
    """Run ``command`` to its end. However that comes about, nothing of its process group is left, and its scratch files lie in ``scratch``.

    Raises:
        LabError: It failed or took too long; with its last words.
    """
    # Its own group: a Ctrl-C reaches us alone, and we end all of it.
    with (
        (scratch / "errors").open("w+b") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=os.environ | {"LC_ALL": "C", "TMPDIR": str(scratch)},
            start_new_session=True,
        ) as process,
    ):
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise LabError(f"{command[0]} did not end within {limit_s:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TERM_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
    if status != 0:
        raise LabError(explain(command[0], status, text))


def explain(tool: str, status: int, text: str) -> str:
    """Why ``tool`` failed, in one line with what helps; ``text`` is what it said."""
    said = (
        "; ".join(line.strip() for line in text.splitlines()[-8:] if line.strip()) or f"exit status {status}"
    )
    if "No space left on device" in text:
        return f"{tool} ran out of disk space: make room, or name another directory in CASEMATE_LAB_CACHE ({said})"
    if "404 " in text or "Unable to locate package" in text or "has no installation candidate" in text:
        return f"{tool}: a package is gone from the archive: run apt-get update and try again ({said})"
    if "Could not resolve" in text or "Could not connect" in text or "Failed to fetch" in text:
        return f"{tool}: the package archive can't be reached ({said})"
    return f"{tool} failed: {said}"
