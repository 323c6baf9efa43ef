from __future__ import annotations

import os
from pathlib import Path

import pytest

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest.apt import Apt, AptKernel, choose_kernel, parse_packages, version_key
from tests.support.guest_files import write_fake_apt

SHOWN = """\
Package: linux-image-6.1.0-9-cloud-amd64
Version: 6.1.90-1
Filename: pool/main/a.deb
Size: 26713492
Description: Linux 6.1
 More: text that is no field

Package: linux-image-6.1.0-56-cloud-amd64
Version: 6.1.192-2
Filename: pool/main/b.deb
Size: 26713493

Package: linux-image-6.12.117+deb12-cloud-amd64
Version: 6.12.117-1~deb12u1
Filename: pool/updates/main/c.deb
Size: 34307256

Package: linux-image-6.13.1-cloud-amd64
Version: 6.13.1-1
Status: install ok installed

Package: linux-image-6.12-cloud-amd64
Version: 6.12.117-1
Filename: pool/main/meta.deb

Package: linux-image-6.12.117+deb12-cloud-amd64-dbg
Version: 6.12.117-1~deb12u1
Filename: pool/main/dbg.deb

Package: linux-image-6.14.0-15-generic
Version: 6.14.0-15.15
Filename: pool/main/g.deb
"""
KERNELS = parse_packages(SHOWN)


def test_parse_packages_keeps_what_can_be_downloaded_and_is_a_kernel() -> None:
    assert [kernel.release for kernel in KERNELS] == [
        "6.1.0-9-cloud-amd64",
        "6.1.0-56-cloud-amd64",
        "6.12.117+deb12-cloud-amd64",
        "6.14.0-15-generic",
    ]
    assert KERNELS[2] == AptKernel(
        package="linux-image-6.12.117+deb12-cloud-amd64",
        version="6.12.117-1~deb12u1",
        release="6.12.117+deb12-cloud-amd64",
        flavour="cloud-amd64",
        size_bytes=34307256,
    )


@pytest.mark.parametrize(
    ("series", "release"),
    [
        (None, "6.12.117+deb12-cloud-amd64"),
        ("6.12", "6.12.117+deb12-cloud-amd64"),
        ("6.1", "6.1.0-56-cloud-amd64"),
        ("6.14", "6.14.0-15-generic"),
    ],
)
def test_choose_kernel_takes_the_newest_of_the_series_and_cloud_before_generic(
    series: str | None, release: str
) -> None:
    assert choose_kernel(KERNELS, series).release == release


def test_choose_kernel_of_unknown_series_lists_what_there_is() -> None:
    with pytest.raises(
        InvalidConfigError, match=r"series 9\.9 is not offered .* they have: 6\.1, 6\.12, 6\.14"
    ) as caught:
        choose_kernel(KERNELS, "9.9")
    assert caught.value.path == "kernel"


def test_version_key_orders_by_number() -> None:
    assert version_key("6.1.0-56") > version_key("6.1.0-9")
    assert version_key("6.12.117+deb12") > version_key("6.12.9+deb12")


@pytest.fixture
def bin_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def test_download_returns_file_and_reports_progress(bin_path: Path, tmp_path: Path) -> None:
    write_fake_apt(bin_path, ["6.1.0-56-cloud-amd64"])
    told = []
    apt = Apt(progress=lambda *step: told.append(step))
    target = tmp_path / "target"
    target.mkdir()

    files = apt.download(apt.list_kernels()[0], target)

    assert files == (target / "linux-image-6.1.0-56-cloud-amd64.deb",)
    assert told == [("linux-image-6.1.0-56-cloud-amd64", 500, 1000)]


def test_list_kernels_without_lists_as_root_fetches_them_once(
    bin_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_fake_apt(bin_path, ["6.1.0-56-cloud-amd64"], lists=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    assert [kernel.series for kernel in Apt().list_kernels()] == ["6.1"]
    assert log.read_text().count(" update") == 1


def test_list_kernels_without_lists_as_user_says_the_line_to_run(
    bin_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fake_apt(bin_path, ["6.1.0-56-cloud-amd64"], lists=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(UnsupportedError, match="run once: sudo apt-get update"):
        Apt().list_kernels()


def test_download_that_fails_has_the_words_of_apt(bin_path: Path, tmp_path: Path) -> None:
    write_fake_apt(bin_path, ["6.1.0-56-cloud-amd64"])
    kernel = Apt().list_kernels()[0]
    (bin_path / f"{kernel.package}.deb").unlink()

    with pytest.raises(UnsupportedError, match=r"Unable to fetch linux-image-6\.1\.0-56-cloud-amd64: 404"):
        Apt().download(kernel, tmp_path)


def test_list_kernels_where_apt_is_missing_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert not Apt.is_installed()
    with pytest.raises(UnsupportedError, match="apt-cache is not installed"):
        Apt().list_kernels()
