"""A container from a registry: pulled by the start itself, kept while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate import Settings, images
from tests.support import registry

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.registry]

CASEMATE = [sys.executable, "-m", "casemate"]


def casemate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CASEMATE, *words], capture_output=True, text=True, timeout=200)


@pytest.fixture
def pushed(open_registry: str, busybox_image: Path, settings: Settings) -> Iterator[str]:
    """Name of an image in a registry that is not here; taken away again if it came."""
    name = f"{open_registry}/library/busybox:e2e"
    registry.push(busybox_image, name)
    yield name
    images.remove(name, settings)


def test_run_when_image_is_in_a_registry_then_pulled_used_and_kept_while_it_runs(
    pushed: str, settings: Settings
) -> None:
    with subprocess.Popen(
        [*CASEMATE, "run", "-i", "--name", "puller", f"docker://{pushed}", "--", "sh", "-c", "echo up; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdin is not None and owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        refused = casemate("rmi", pushed)
        assert refused.returncode == 1 and "used by sandbox puller" in refused.stderr
        (chosen,) = [one for one in json.loads(casemate("images", "--json").stdout) if one["name"] == pushed]
        record = Path(chosen["rootfs"]).parent / "record.json"
        os.utime(record, (time.time() - 90 * 86400,) * 2)
        assert pushed not in json.loads(casemate("images", "gc", "--json", "--dry-run").stdout)["removed"]
        owner.stdin.close()
        assert owner.wait(100) == 0
    assert pushed in json.loads(casemate("images", "gc", "--json", "--dry-run").stdout)["removed"]
    again = casemate("run", pushed, "--", "echo", "again")
    assert (again.returncode, again.stdout) == (0, "again\n"), again.stderr
