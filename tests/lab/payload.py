"""What a test run in the lab is made of: the built wheel, what the tests import, the tests themselves."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from casemate.guest.store import Store
from tests.lab.image import GUEST_CACHE, run_group
from tests.lab.job import HOME, Job

__all__ = ["ROOT", "build_package", "ensure_libraries", "requirements", "test_job"]

ROOT = Path(__file__).resolve().parents[2]
TREE = ("tests", "scripts", "pyproject.toml")
# What an interpreter on Debian can load; the newest first.
PLATFORMS = (
    "manylinux_2_34_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
LOCK_LIMIT_S = 900.0
PIP_LIMIT_S = 1200.0
GUEST_FACTOR = 20
"""Deadlines in the lab are this much longer: its guests run under emulation twice over."""

Say = Callable[[str], None]


def requirements(project: str) -> tuple[str, ...]:
    """What the package and its tests need from others, by the text of ``pyproject.toml``."""
    document = tomllib.loads(project)
    return tuple(sorted((*document["project"]["dependencies"], *document["dependency-groups"]["test"])))


def ensure_libraries(cache: Path, python: str, *, say: Say, timeout_factor: float) -> Path:
    """Directory with all that the tests import and that is not ours, for the lab's Python; fetched once.

    Raises:
        LabError: pip could not.
    """
    wanted = requirements((ROOT / "pyproject.toml").read_text("utf-8"))
    key = hashlib.sha256(repr((python, wanted, sys.version_info[:2])).encode()).hexdigest()[:16]
    store = Store(cache)
    directory = cache / "libraries" / key
    with store.lock("libraries", deadline_s=LOCK_LIMIT_S * timeout_factor):
        if not directory.is_dir():
            say("fetching what the tests import")
            with store.staging("libraries") as staging:
                target = staging / "made"
                _pip(
                    staging, timeout_factor, "install", f"--target={target}", f"--python-version={python}", "--implementation=cp",
                    "--only-binary=:all:", *(f"--platform={name}" for name in PLATFORMS), *wanted,
                )  # fmt: skip
                shutil.rmtree(directory.parent, ignore_errors=True)
                directory.parent.mkdir()
                target.rename(directory)
    return directory


def build_package(directory: Path, *, timeout_factor: float) -> Path:
    """Build the wheel of this tree into ``directory`` and unpack it; return where. Raises: LabError."""
    wheels = directory / "wheel"
    _pip(
        directory, timeout_factor, "wheel", "--no-deps", "--no-build-isolation", "--config-settings=profile=quick",
        f"--wheel-dir={wheels}", str(ROOT),
    )  # fmt: skip
    (wheel,) = wheels.glob("casemate-*.whl")
    target = directory / "package"
    _pip(directory, timeout_factor, "install", "--no-deps", f"--target={target}", str(wheel))
    return target


def test_job(package: Path, libraries: Path, tests: Path, arguments: Sequence[str], *, limit_s: int) -> Job:
    """A pytest run in the lab over the tests that the file ``tests`` names; its report and junit file come back."""
    return Job(
        command=(
            *("python3", "-m", "pytest", "-p", "no:cacheprovider", "--no-header"),
            *("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout"),
            *("--verbose", "--color=no"),
            *(f"--report={HOME}/out/report.json", f"--junitxml={HOME}/out/junit.xml"),
            *arguments,
            f"@{HOME}/tests.txt",
        ),
        environment={
            "PYTHONPATH": f"{HOME}/package:{HOME}/libraries",
            "CASEMATE_IN_LAB": "1",
            # Those above are named: looking for others, and importing them, takes half a minute.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "CASEMATE_TEST_CACHE": GUEST_CACHE,
            "CASEMATE_TIMEOUT_FACTOR": str(GUEST_FACTOR),
        },
        files={
            "package": package,
            "libraries": libraries,
            "tests.txt": tests,
            **{f"tree/{name}": ROOT / name for name in TREE},
        },
        directory=f"{HOME}/tree",
        limit_s=limit_s,
    )


def _pip(scratch: Path, timeout_factor: float, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    run_group(command, limit_s=PIP_LIMIT_S * timeout_factor, scratch=scratch)
