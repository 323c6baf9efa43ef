"""What the first line of a program costs, counted in modules; processor time is the benchmark's matter."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHEAP = "from casemate import Sandbox, SandboxConfig; SandboxConfig()"
# Each would cost more than most of ours, or start something.
FORBIDDEN = (
    "asyncio",
    "concurrent",
    "dataclasses",
    "email",
    "http",
    "logging",
    "lzma",
    "multiprocessing",
    "random",
    "rich",
    "ssl",
    "subprocess",
    "tarfile",
    "tempfile",
    "tomllib",
    "unittest",
    "urllib.request",
)
# What any program with checked documents and paths has.
GIVEN = "import msgspec, pathlib"
MODULES_OVER_GIVEN = 75


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after ``code``."""
    program = f"{code}\nimport sys; print(*sorted(sys.modules), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def added() -> set[str]:
    """Modules that the cheap line adds to what is given."""
    return modules_after(CHEAP) - modules_after(GIVEN)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_import_when_sandbox_is_named_then_costly_module_is_not_loaded(added: set[str], name: str) -> None:
    assert not {module for module in added if module == name or module.startswith(f"{name}.")}


def test_import_when_sandbox_is_named_then_count_is_in_budget(added: set[str]) -> None:
    assert len(added) <= MODULES_OVER_GIVEN, sorted(added)


def test_import_when_only_the_package_is_imported_then_nothing_else_of_ours_is_loaded() -> None:
    loaded = modules_after("import casemate")
    assert {name for name in loaded if name.startswith("casemate")} == {"casemate"}


def test_import_when_an_error_is_named_then_native_module_is_not_loaded() -> None:
    assert "casemate._core" not in modules_after("from casemate import CasemateError")
