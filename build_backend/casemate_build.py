"""PEP 517 backend: build the static guest agent and the keeper, then let maturin build the rest.

One setting of our own, ``profile``: ``release`` (default) or ``quick`` (no link-time optimisation, for work on the tree)::

    pip install -e . --no-build-isolation -C profile=quick
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import maturin

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "python" / "casemate" / "_bin"
PROFILES = ("release", "quick")
SOURCES = (
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "build_backend",
    "pyproject.toml",
    "python",
    "rust",
)

Settings = dict[str, Any] | None


class BuildError(Exception):
    """The build can't go on; the text says what is missing and how to get it."""


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What maturin needs; of its own the backend needs nothing from the index."""
    return cast("list[str]", maturin.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    return cast("list[str]", maturin.get_requires_for_build_editable(config_settings))


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    return cast("list[str]", maturin.get_requires_for_build_sdist(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """Metadata alone: no agent is built."""
    with _maturin_profile(_profile(config_settings)):
        return cast("str", maturin.prepare_metadata_for_build_wheel(metadata_directory, None))


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build agent, keeper and extension, return the wheel's file name."""
    profile = _profile(config_settings)
    build_programs(profile)
    with _maturin_profile(profile):
        return cast("str", maturin.build_wheel(wheel_directory, None, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build agent, keeper and extension into the source tree, return the name of the wheel that points there."""
    profile = _profile(config_settings)
    build_programs(profile)
    with _maturin_profile(profile):
        return cast("str", maturin.build_editable(wheel_directory, None, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Pack the sources; nothing is compiled. All crates travel, as the wheel needs more than the extension's."""
    with tempfile.TemporaryDirectory() as scratch:
        information = prepare_metadata_for_build_wheel(scratch, config_settings)
        metadata = (Path(scratch) / information / "METADATA").read_bytes()
    stem = information.removesuffix(".dist-info")
    path = Path(sdist_directory) / f"{stem}.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for file in sorted(_source_files()):
            archive.add(file, f"{stem}/{file.relative_to(ROOT)}", recursive=False, filter=_anonymous)
        member = tarfile.TarInfo(f"{stem}/PKG-INFO")
        member.size = len(metadata)
        archive.addfile(member, io.BytesIO(metadata))
    return path.name


def _source_files() -> Iterator[Path]:
    for name in SOURCES:
        top = ROOT / name
        for file in (top,) if top.is_file() else top.rglob("*"):
            made = (
                file.suffix in (".so", ".pyc")
                or OUT in file.parents
                or "target" in file.parts[len(ROOT.parts) :]
            )
            if file.is_file() and not made:
                yield file


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def build_programs(profile: str) -> None:
    """Build the static guest agent and the keeper into ``python/casemate/_bin``.

    Raises:
        BuildError: No Rust, or no target that links statically; the text has the cure.
    """
    cargo = shutil.which("cargo")
    if cargo is None:
        raise BuildError("cargo is not on PATH: casemate's native parts need Rust 1.88 or newer")
    missing = missing_static_target()
    if missing is not None:
        raise BuildError(missing)
    for program, title in (("agent", "the guest agent"), ("keeper", "the keeper")):
        # Without its other commands xtask is compiled in seconds.
        command = [cargo, "run", "--quiet", "--locked", "-p", "xtask", "--no-default-features", "--"]
        command += [program, "--out", str(OUT), "--profile", "quick" if profile == "quick" else "agent"]
        try:
            subprocess.run(command, cwd=ROOT, check=True)
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{title} was not built: cargo ended with status {error.returncode}") from error


def missing_static_target() -> str | None:
    """Say what is missing for a static build; None when musl's target, or else a static C library, is there."""
    machine = platform.machine()
    musl, gnu = f"{machine}-unknown-linux-musl", f"{machine}-unknown-linux-gnu"
    if _has_target(musl) or (_has_target(gnu) and _has_static_libc()):
        return None
    return (
        "the guest agent is a static binary and no way to link one was found. Either\n"
        f"  rustup target add {musl}, or\n"
        "  a static C library for the host's own target (Debian: apt-get install libc6-dev; Fedora: dnf install glibc-static)"
    )


def _has_target(target: str) -> bool:
    found = subprocess.run(
        ["rustc", "--print", "target-libdir", "--target", target], capture_output=True, text=True, check=False
    )
    directory = Path(found.stdout.strip())
    return found.returncode == 0 and directory.is_dir() and any(directory.glob("libstd-*"))


def _has_static_libc() -> bool:
    compiler = shutil.which("cc")
    if compiler is None:
        return False
    found = subprocess.run([compiler, "-print-file-name=libc.a"], capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()).is_absolute()


def _profile(config_settings: Settings) -> str:
    profile = str((config_settings or {}).get("profile", "release"))
    if profile not in PROFILES:
        raise BuildError(f"profile is {profile!r}, one of {', '.join(PROFILES)} is expected")
    return profile


@contextmanager
def _maturin_profile(profile: str) -> Iterator[None]:
    """Tell maturin the Cargo profile the one way it takes for all of its hooks."""
    name = "MATURIN_PEP517_ARGS"
    before = os.environ.get(name)
    os.environ[name] = f"{before or ''} --profile {profile}".strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
