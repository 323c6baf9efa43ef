"""Every command of the project. All of them run in ``.venv``, which ``./dev`` makes and keeps up to date."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
PYTHON = sys.executable
PROFILE = ("--profile", "quick")
REPORT = ROOT / "test-report"

nox.options.default_venv_backend = "none"
nox.options.sessions = ["check"]


def tool(session: nox.Session, name: str, *arguments: str) -> None:
    """Run a tool of ``.venv`` by its module or script."""
    session.run(str(Path(PYTHON).parent / name), *arguments, external=True)


def python(session: nox.Session, *arguments: str) -> None:
    """Run Python on a script or module of this tree."""
    session.run(PYTHON, *arguments, external=True)


def cargo(session: nox.Session, *arguments: str) -> None:
    """Run cargo, with the lock file as it is."""
    session.run("cargo", *arguments, external=True)


def pytest(session: nox.Session, name: str, *arguments: str) -> None:
    """Run pytest; its counts go to the report under ``name``."""
    python(session, "-m", "pytest", *report_to(name), *arguments)


def report_to(name: str) -> tuple[str, str]:
    """Pytest's options for the counts; what can't be collected counts as failed, and the rest runs."""
    return (f"--report={REPORT / name}.json", "--continue-on-collection-errors")


@nox.session
def check(session: nox.Session) -> None:
    """Formatting, lints, types, stubs, generated files; changes nothing."""
    cargo(session, "fmt", "--all", "--check")
    cargo(
        session,
        "clippy",
        "--quiet",
        "--locked",
        *PROFILE,
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    )
    tool(session, "ruff", "format", "--check", "--quiet")
    tool(session, "ruff", "check", "--quiet")
    python(session, "scripts/unasync.py", "--check")
    python(session, "scripts/parity.py")
    tool(session, "mypy", "--no-error-summary")
    tool(session, "pyright", "--warnings")
    tool(session, "lint-imports", "--no-cache")
    python(session, "-m", "mypy.stubtest", "casemate._core", "--mypy-config-file", "pyproject.toml")
    cargo(session, "run", "--quiet", "--locked", *PROFILE, "--bin", "xtask", "--", "proto", "--check")


@nox.session
def fix(session: nox.Session) -> None:
    """What a tool can mend: formatting, simple lints, generated files."""
    cargo(session, "fmt", "--all")
    python(session, "scripts/unasync.py")
    tool(session, "ruff", "check", "--fix", "--quiet", "--exit-zero")
    tool(session, "ruff", "format", "--quiet")
    cargo(session, "run", "--quiet", "--locked", *PROFILE, "--bin", "xtask", "--", "proto")


@nox.session
def local(session: nox.Session) -> None:
    """Before a commit: mend, check, unit and contract tests of both languages."""
    for name in ("fix", "check", "rust", "unit"):
        session.notify(name)


@nox.session
def rust(session: nox.Session) -> None:
    """Tests of the crates."""
    python(session, *rust_tests(), *session.posargs)


def rust_tests() -> list[str]:
    """The command that runs the crates' tests and counts them."""
    command = ["cargo", "test", "--locked", *PROFILE, "--workspace", "--no-fail-fast"]
    return ["scripts/test_report.py", "run", str(REPORT / "rust.json"), *command]


@nox.session
def fuzz(session: nox.Session) -> None:
    """Every fuzz target over its seeds and mutations of them; libFuzzer is not needed."""
    python(session, *fuzz_tests(), *session.posargs)


def fuzz_tests() -> list[str]:
    """The command that runs the fuzz targets as tests and counts them."""
    command = [
        "cargo",
        "test",
        "--locked",
        "--release",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--no-fail-fast",
    ]
    return ["scripts/test_report.py", "run", str(REPORT / "fuzz.json"), *command]


@nox.session
def unit(session: nox.Session) -> None:
    """Tests without a VMM."""
    pytest(session, "unit", *existing("tests/unit", "tests/contract"), *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """Tests against the host: processes, files, sockets, a VMM without a guest."""
    pytest(session, "integration", *existing("tests/integration"), *session.posargs)


@nox.session
def e2e(session: nox.Session) -> None:
    """Tests with a guest."""
    pytest(session, "e2e", *existing("tests/e2e"), *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """Check and all tests, then the counts; ``--all``: the whole lab; ``--no-lab``: none; other arguments run pytest alone."""
    if session.posargs and session.posargs not in (["--all"], ["--no-lab"]):
        python(session, "-m", "pytest", *session.posargs)
        return
    shutil.rmtree(REPORT, ignore_errors=True)
    check(session)
    # A failed test does not keep the others from being run and counted; the last command judges.
    go_on = [0, 1]
    session.run(PYTHON, *rust_tests(), success_codes=go_on, external=True)
    session.run(PYTHON, *fuzz_tests(), success_codes=go_on, external=True)
    for name, levels in (("unit", ("unit", "contract")), ("host", ("integration", "e2e", "lab"))):
        directories = existing(*(f"tests/{level}" for level in levels))
        session.run(
            PYTHON, "-m", "pytest", *report_to(name), *directories, success_codes=go_on, external=True
        )
    if session.posargs != ["--no-lab"]:
        chosen = [] if session.posargs else ["--smoke"]
        report = f"--report={REPORT / 'lab.json'}"
        session.run(PYTHON, "-m", "tests.lab", "test", *chosen, report, success_codes=go_on, external=True)
    python(session, "scripts/test_report.py", "total", str(REPORT))


@nox.session
def bench(session: nox.Session) -> None:
    """The start-up benchmark; arguments go to it."""
    python(session, "-m", "casemate.cli", "bench", "startup", *session.posargs)


@nox.session
def perf(session: nox.Session) -> None:
    """Promises as tests; wants a quiet machine."""
    pytest(session, "perf", *existing("tests/perf"), *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """News of the next release from its fragments, and dead links inside the documents."""
    tool(session, "towncrier", "build", "--draft", "--version", "next")
    python(session, "scripts/links.py")


@nox.session
def wheels(session: nox.Session) -> None:
    """A release wheel and a source archive in ``dist``."""
    python(session, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    pack = "import sys; sys.path.insert(0, 'build_backend'); import casemate_build; casemate_build.build_sdist('dist')"
    python(session, "-c", pack)


def existing(*directories: str) -> list[str]:
    """Those of the directories that are there."""
    return [name for name in directories if (ROOT / name).is_dir()]
