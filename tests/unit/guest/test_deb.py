from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from casemate.errors import InvalidConfigError
from casemate.guest import deb
from tests.support.guest_files import make_deb

PACKAGE = make_deb({"boot/vmlinuz-1": b"kernel", "lib/x": b"module"})


@pytest.fixture(params=["dpkg-deb", "ourselves"])
def unpacker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ourselves":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb on PATH")
    return str(request.param)


def test_unpack_deb_writes_its_files(unpacker: str, tmp_path: Path) -> None:
    package = tmp_path / "a.deb"
    package.write_bytes(PACKAGE)

    deb.unpack_deb(package, tmp_path / "out", deadline_s=20)

    assert (tmp_path / "out/boot/vmlinuz-1").read_bytes() == b"kernel"
    assert (tmp_path / "out/lib/x").read_bytes() == b"module"


@pytest.mark.parametrize(
    "content", [PACKAGE[:-60], PACKAGE[:100], b"no package", PACKAGE[:200] + bytes(len(PACKAGE))]
)
def test_unpack_deb_that_is_damaged_raises(unpacker: str, content: bytes, tmp_path: Path) -> None:
    package = tmp_path / "a.deb"
    package.write_bytes(content)

    with pytest.raises(InvalidConfigError, match=r"a\.deb"):
        deb.unpack_deb(package, tmp_path / "out", deadline_s=20)


def test_unpack_by_ourselves_of_member_outside_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = tmp_path / "a.deb"
    package.write_bytes(make_deb({"../../evil": b"x"}))

    with pytest.raises(InvalidConfigError, match="can't be unpacked"):
        deb.unpack_deb(package, tmp_path / "deep/out", deadline_s=20)
    assert not (tmp_path / "evil").exists()
