"""An environment with nothing but a wheel of this tree and what it depends on, made without a network."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

__all__ = ["build_wheel", "clean_environment", "make_environment", "repack"]

ROOT = Path(__file__).resolve().parents[2]
_BUILD = """
import sys
sys.path.insert(0, "build_backend")
import casemate_build
casemate_build.build_wheel(sys.argv[1], {"profile": "quick"})
"""


def build_wheel(directory: Path) -> Path:
    """A wheel of this tree, built by its own back end in the profile of development: the release's is smaller."""
    # The back end calls maturin by name, as it is found in an installer's environment.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, directory], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = directory.glob("*.whl")
    return wheel


def repack(name: str, directory: Path) -> Path:
    """The installed distribution ``name`` as the wheel it came from: what an installer without an index is pointed at."""
    distribution = importlib.metadata.distribution(name)
    tags = [
        line.split(": ")[1]
        for line in (distribution.read_text("WHEEL") or "").splitlines()
        if line.startswith("Tag: ")
    ]
    python, abi, _ = tags[0].split("-")
    platforms = ".".join(tag.split("-")[2] for tag in tags)
    wheel = directory / f"{name}-{distribution.version}-{python}-{abi}-{platforms}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in distribution.files or ():
            if (
                file.parts[0] != ".."
                and file.suffix != ".pyc"
                and file.name not in ("INSTALLER", "REQUESTED")
            ):
                archive.write(Path(str(file.locate())), str(file))
    return wheel


def make_environment(directory: Path, wheels: Path, wheel: Path) -> Path:
    """A virtual environment with ``wheel`` installed from it and ``wheels`` alone; the directory of its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=60)
    programs = directory / "bin"
    install = ["install", "--no-index", "--find-links", str(wheels), "--no-cache-dir", "--quiet", str(wheel)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", programs / "python", "--isolated", *install],
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return programs


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what would lead Python to this tree."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PIP_"))
    }
    return kept | more
