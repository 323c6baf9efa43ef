"""The choice of a filesystem, and what is said when its program fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from casemate.errors import DeadlineExceededError, HostError, UnsupportedError
from casemate.images.rootfs import choose_filesystem, make_filesystem

DIGEST = f"sha256:{'ab' * 32}"


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mkfs.erofs"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_choose_filesystem_when_both_are_there_then_erofs() -> None:
    assert choose_filesystem({"erofs": "/e", "ext4": "/x"}) == ("erofs", "/e")
    assert choose_filesystem({"erofs": None, "ext4": "/x"}) == ("ext4", "/x")


def test_choose_filesystem_when_none_is_there_then_error_with_the_cure() -> None:
    with pytest.raises(UnsupportedError, match=r"install erofs-utils .* or e2fsprogs") as caught:
        choose_filesystem({"erofs": None, "ext4": None})
    assert caught.value.capability == "mkfs.erofs"


def test_make_filesystem_when_program_fails_then_its_words(tmp_path: Path) -> None:
    failing = program(tmp_path, "yes noise | head -n 100000; echo no space left >&2; exit 3")
    with pytest.raises(HostError, match=r"mkfs.erofs failed with status 3: (.|\n)*no space left") as caught:
        make_filesystem("erofs", failing, tmp_path, tmp_path / "x", digest=DIGEST, timeout_s=10)
    assert len(str(caught.value)) < 5000 and caught.value.target == failing


def test_make_filesystem_when_program_hangs_then_deadline(tmp_path: Path) -> None:
    hanging = program(tmp_path, "exec sleep 60")
    with pytest.raises(DeadlineExceededError) as caught:
        make_filesystem("erofs", hanging, tmp_path, tmp_path / "x", digest=DIGEST, timeout_s=0.2)
    assert caught.value.deadline_s == 0.2


def test_make_filesystem_when_program_is_gone_then_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="can't be started"):
        make_filesystem("erofs", "/absent/mkfs", tmp_path, tmp_path / "x", digest=DIGEST, timeout_s=10)
