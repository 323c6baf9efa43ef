"""The image's name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.lab.recipe import Recipe, image_key, parse_policy

RECIPE = Recipe(suite="bookworm", versions={"bash": "5.2", "kmod": "30"}, kernel_id="linux-6.12", init=b"#!")

POLICY = """\
bash:
  Installed: 5.2.15-2
  Candidate: 5.2.15-2+b7
  Version table:
 *** 5.2.15-2+b7 500
qemu-system-x86:
  Installed: (none)
  Candidate: 1:7.2+dfsg-7
gone:
  Installed: (none)
  Candidate: (none)
"""


def test_image_key_when_versions_come_in_another_order_then_is_the_same() -> None:
    other = msgspec.structs.replace(RECIPE, versions={"kmod": "30", "bash": "5.2"})
    assert image_key(other) == image_key(RECIPE)
    assert image_key(RECIPE).startswith("bookworm-")


@pytest.mark.parametrize(
    "change",
    [
        {"suite": "trixie"},
        {"versions": {"bash": "5.3", "kmod": "30"}},
        {"kernel_id": "linux-6.13"},
        {"init": b"#!/bin/bash"},
        {"packages": ("bash",)},
        {"modules": ("kvm_amd",)},
    ],
)
def test_image_key_when_anything_of_it_changes_then_is_another(change: dict[str, Any]) -> None:
    assert image_key(msgspec.structs.replace(RECIPE, **change)) != image_key(RECIPE)


def test_parse_policy_when_packages_are_listed_then_candidates_are_taken() -> None:
    assert parse_policy(POLICY) == {"bash": "5.2.15-2+b7", "qemu-system-x86": "1:7.2+dfsg-7"}
