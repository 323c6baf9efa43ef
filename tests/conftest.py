"""Fixtures and rules for all tests: capabilities, time limits, isolated roots, the leak check."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate import _core
from casemate.config.settings import Settings
from tests.support import capabilities, images, leaks, placement, registry
from tests.support.fake_vm import FakeVm, make_fake_vm
from tests.support.report import level_of

if not capabilities.IN_LAB:
    # Not in the lab, where importing it takes seconds and no test needs it.
    import hypothesis

    # A busy machine is no finding of a test; the time limit of the whole test stays.
    hypothesis.settings.register_profile("casemate", deadline=None)
    hypothesis.settings.load_profile("casemate")

# Tests with a guest wait for one that is emulated on a busy machine.
TIME_LIMITS_S = {"integration": 120, "e2e": 300, "lab": 900, "perf": 900}
PURE_LEVELS = ("unit", "contract", "other")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lab", "the lab (docs/lab.md)")
    group.addoption("--lab-list", type=Path, help="write the tests that are left to the lab to this file")
    group.addoption(
        "--lab-whole", action="store_true", help="with --lab-list: also those that could run on this host"
    )


def needs_of(item: pytest.Item) -> tuple[str, ...]:
    """Capabilities that the marks of a test name."""
    return tuple(name for name in capabilities.MARKERS if item.get_closest_marker(name) is not None)


def placement_of(item: pytest.Item) -> placement.Placement:
    """Where a test runs."""
    return placement.place(needs_of(item), capabilities.missing, in_lab=capabilities.IN_LAB)


# Before the marks are chosen by -m.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        limit = TIME_LIMITS_S.get(level_of(item.nodeid))
        if limit is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit))
        if not placement.OFFERED_BY_LAB.isdisjoint(needs_of(item)):
            item.add_marker(pytest.mark.lab)


def pytest_collection_finish(session: pytest.Session) -> None:
    file: Path | None = session.config.getoption("--lab-list")
    if file is not None:
        whole = session.config.getoption("--lab-whole")
        chosen = [
            item.nodeid
            for item in session.items
            if placement_of(item).where == "lab" or (whole and item.get_closest_marker("lab") is not None)
        ]
        file.write_text("".join(f"{nodeid}\n" for nodeid in chosen), "utf-8")


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.user_properties.append(("needs", needs_of(item)))
    found = placement_of(item)
    if found.where != "here":
        pytest.skip(found.reason)


@pytest.fixture(scope="session")
def cache_root() -> Path:
    """Kernels, initrds and images: kept between runs, outside the tree (``CASEMATE_TEST_CACHE``)."""
    chosen = os.environ.get("CASEMATE_TEST_CACHE")
    root = Path(chosen) if chosen else Path.home() / ".cache" / "casemate-tests"
    root.mkdir(parents=True, exist_ok=True)
    return root


@pytest.fixture(scope="session")
def _state_base() -> Iterator[Path]:
    # Short: a socket's path has 108 bytes and a sandbox adds some 40 of its own.
    base = Path(tempfile.mkdtemp(prefix="cm-", dir="/tmp"))
    yield base
    shutil.rmtree(base)


@pytest.fixture
def state_root(_state_base: Path) -> Iterator[Path]:
    """An empty state root of this test alone."""
    root = Path(tempfile.mkdtemp(prefix="s", dir=_state_base))
    yield root
    shutil.rmtree(root)


@pytest.fixture
def settings(state_root: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with isolated roots, also in the environment, for programs that the test starts."""
    monkeypatch.setenv("CASEMATE_STATE_ROOT", str(state_root))
    monkeypatch.setenv("CASEMATE_CACHE", str(cache_root))
    return Settings.from_environment()


@pytest.fixture(scope="session")
def _fake_vm_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake-vm")


@pytest.fixture
def fake_vm(_fake_vm_directory: Path, state_root: Path, tmp_path: Path) -> FakeVm:
    """Sandboxes without a guest, in a state root of this test alone. The cache is shared by the run."""
    return make_fake_vm(
        _fake_vm_directory, _fake_vm_directory / "cache", state_root, tmp_path / "asked.jsonl"
    )


@pytest.fixture(scope="session", autouse=True)
def _watch_thread() -> None:
    """The native watch thread, which is made on first use and stays: here, so that no test's leak check sees it come."""
    _core.spawn(["true"]).wait(10)


@pytest.fixture(scope="session")
def _permanent_threads() -> None:
    leaks.start_permanent_threads()


@pytest.fixture(autouse=True)
def _no_leaks(_permanent_threads: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare what is there after a test with what was there before it; pure tests get the cheap half."""
    if request.node.get_closest_marker("leaks_by_design") is not None:
        yield
        return
    whole_host = level_of(request.node.nodeid) not in PURE_LEVELS
    root: Path | None = request.getfixturevalue("state_root") if whole_host else None

    def take() -> leaks.Snapshot:
        return leaks.take_snapshot(whole_host=whole_host, state_root=root)

    before = take()
    yield
    left = leaks.find_leaks(before, take)
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def busybox_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OCI layout with a static busybox and its links: small and quick to start."""
    if lack := capabilities.missing("busybox"):
        pytest.skip(f"needs {lack}")
    return images.build_busybox_layout(tmp_path_factory.mktemp("busybox") / "image")


@pytest.fixture(scope="session")
def registry_program(cache_root: Path) -> str:
    """Program of a real registry."""
    if lack := capabilities.missing("registry"):
        pytest.skip(f"needs {lack}")
    return registry.find_program(cache_root)


@pytest.fixture(scope="session")
def open_registry(registry_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a registry that serves everybody."""
    with registry.serving(registry_program, tmp_path_factory.mktemp("registry") / "open") as address:
        yield address


@pytest.fixture(scope="session")
def locked_registry(registry_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a registry that wants a user and a password."""
    with registry.serving(
        registry_program, tmp_path_factory.mktemp("registry") / "locked", locked=True
    ) as address:
        yield address


@pytest.fixture(scope="session")
def busybox(busybox_image: Path) -> str:
    """Reference of :func:`busybox_image`."""
    return f"oci:{busybox_image}"


@pytest.fixture(scope="session")
def debian_image(cache_root: Path) -> Path:
    """OCI layout of a Debian userland with Python, built from packages once and kept in the cache."""
    if lack := capabilities.missing("mmdebstrap"):
        pytest.skip(f"needs {lack}")
    return images.build_debian_image(cache_root)


@pytest.fixture(scope="session")
def debian(debian_image: Path) -> str:
    """Reference of :func:`debian_image`."""
    return f"oci:{debian_image}"
