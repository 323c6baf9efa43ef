"""The README's examples run and print what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from casemate import Settings
from tests.support.readme import Example, matches, read_examples

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.mmdebstrap]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = read_examples((ROOT / "README.md").read_text("utf-8"))


@pytest.fixture
def directory(tmp_path: Path, debian_image: Path) -> Path:
    """A directory as the README assumes it: the image lies in ``debian``."""
    (tmp_path / "debian").symlink_to(debian_image)
    return tmp_path


def test_readme_then_it_has_examples_of_each_face() -> None:
    text = "\n".join(example.code for example in EXAMPLES)
    assert all(
        word in text
        for word in ("casemate.run(", "with Sandbox.create(", "AsyncSandbox.create(", "casemate run")
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line-{example.line}-{example.language}")
def test_example_when_run_then_it_prints_what_the_readme_says(
    example: Example, directory: Path, settings: Settings
) -> None:
    command = [sys.executable, "-c"] if example.language == "python" else ["sh", "-e", "-c"]
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [*command, example.code],
        cwd=directory,
        env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert example.output is None or matches(example.output, done.stdout), done.stdout
