"""The source archive holds what a wheel is built from, and nothing that was built."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "casemate_build", ROOT / "build_backend" / "casemate_build.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    program = "import sys; sys.path.insert(0, 'build_backend'); import casemate_build as b; b.build_sdist(sys.argv[1])"
    # The backend calls maturin by name, as it is found in an installer's environment.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(
        [sys.executable, "-c", program, directory], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    (file,) = directory.iterdir()
    return file


def test_sdist_then_every_crate_of_the_lock_file_is_in_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    crates = {str(path.relative_to(ROOT)) for path in ROOT.glob("rust/*/Cargo.toml")}
    wanted = {"PKG-INFO", "Cargo.toml", "Cargo.lock", "pyproject.toml", "build_backend/casemate_build.py"}
    assert crates | wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "/_bin/" in name]


def test_sdist_when_unpacked_then_cargo_accepts_its_workspace(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    done = subprocess.run(
        ["cargo", "metadata", "--locked", "--offline", "--no-deps", "--format-version=1"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_build_agent_when_no_target_links_statically_then_text_says_what_to_install(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_has_target", lambda _: False)
    text = backend.missing_static_target()
    assert "rustup target add" in text
    assert "libc6-dev" in text


@pytest.mark.parametrize("profile", ["debug", ""])
def test_build_wheel_when_profile_is_unknown_then_it_is_refused(
    backend: ModuleType, profile: str, tmp_path: Path
) -> None:
    with pytest.raises(backend.BuildError, match="release, quick"):
        backend.build_wheel(str(tmp_path), {"profile": profile})
