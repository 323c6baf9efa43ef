from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest.kernel import add_deb, ensure_kernel
from casemate.guest.store import KernelEntry, Store
from tests.support.guest_files import make_deb, make_kernel_deb, make_vmlinux, write_fake_apt

RELEASES = ["6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.117+deb12-cloud-amd64"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "guest")


@pytest.fixture
def apt_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return directory


def _downloads(log: Path) -> int:
    return log.read_text().count(" download ")


def test_ensure_kernel_of_series_keeps_kernel_configuration_and_modules(store: Store, apt_bin: Path) -> None:
    write_fake_apt(apt_bin, RELEASES)

    entry = ensure_kernel(store, "6.1", machine="q35")

    directory = store.kernel_directory(entry.id)
    assert entry.id == "linux-image-6.1.0-56-cloud-amd64-6.1.0-56-cloud-amd64-1"
    assert entry.release == "6.1.0-56-cloud-amd64"
    assert (directory / "vmlinux").read_bytes() == make_vmlinux("6.1.0-56-cloud-amd64")
    assert sorted(path.name for path in directory.iterdir()) == [
        "config", "entry.json", "modules", "vmlinux", "vmlinuz",
    ]  # fmt: skip
    assert (directory / "modules/kernel/fs/erofs/erofs.ko.xz").is_file()


def test_ensure_kernel_of_auto_takes_the_newest_series(store: Store, apt_bin: Path) -> None:
    write_fake_apt(apt_bin, RELEASES)

    assert ensure_kernel(store, "auto", machine="q35").release == RELEASES[2]


def test_ensure_kernel_again_asks_nobody(store: Store, apt_bin: Path) -> None:
    log = write_fake_apt(apt_bin, RELEASES)
    first = ensure_kernel(store, "6.1", machine="q35")
    before = log.read_text()

    assert ensure_kernel(store, "6.1", machine="q35") == first
    assert log.read_text() == before


def test_ensure_kernel_with_refresh_fetches_only_what_is_newer(store: Store, apt_bin: Path) -> None:
    log = write_fake_apt(apt_bin, RELEASES[:1])
    old = ensure_kernel(store, "6.1", machine="q35")
    assert ensure_kernel(store, "6.1", machine="q35", refresh=True) == old
    assert _downloads(log) == 1
    write_fake_apt(apt_bin, RELEASES)

    new = ensure_kernel(store, "6.1", machine="q35", refresh=True)

    assert new.release == RELEASES[1]
    assert store.read_current("6.1") == new
    assert store.read_kernel(old.id) == old


def test_ensure_kernel_from_two_threads_downloads_once(store: Store, apt_bin: Path) -> None:
    log = write_fake_apt(apt_bin, RELEASES)
    found: list[KernelEntry] = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure_kernel(store, "6.1", machine="q35")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 2
    assert found[0] == found[1]
    assert _downloads(log) == 1


def test_ensure_kernel_of_unknown_series_leaves_nothing(store: Store, apt_bin: Path) -> None:
    write_fake_apt(apt_bin, RELEASES)

    with pytest.raises(InvalidConfigError, match=r"they have: 6\.1, 6\.12"):
        ensure_kernel(store, "9.9", machine="q35")
    assert store.list_kernels() == ()
    assert store.read_current("9.9") is None


def test_ensure_kernel_when_download_fails_leaves_nothing_half(store: Store, apt_bin: Path) -> None:
    write_fake_apt(apt_bin, RELEASES)
    (apt_bin / f"linux-image-{RELEASES[1]}.deb").unlink()

    with pytest.raises(UnsupportedError, match="404") as caught:
        ensure_kernel(store, "6.1", machine="q35")
    assert any("apt-get update" in note for note in caught.value.__notes__)
    assert list((store.root / "tmp").iterdir()) == []
    assert store.list_kernels() == ()


def test_ensure_kernel_of_auto_offline_uses_a_kernel_that_is_here(store: Store, apt_bin: Path) -> None:
    write_fake_apt(apt_bin, RELEASES)
    known = ensure_kernel(store, "6.1", machine="q35")
    write_fake_apt(apt_bin, [])

    assert ensure_kernel(store, "auto", machine="q35") == known


def test_ensure_kernel_when_package_is_damaged_leaves_nothing(store: Store, apt_bin: Path) -> None:
    write_fake_apt(apt_bin, RELEASES[:1])
    package = apt_bin / f"linux-image-{RELEASES[0]}.deb"
    package.write_bytes(package.read_bytes()[:-200])

    with pytest.raises(InvalidConfigError, match="can't be unpacked"):
        ensure_kernel(store, "6.1", machine="q35")
    assert store.list_kernels() == ()


def test_ensure_kernel_of_series_without_apt_says_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(UnsupportedError, match="no package manager that is known"):
        ensure_kernel(store, "6.12", machine="q35")


def test_add_deb_of_package_without_kernel_says_how_many(store: Store, tmp_path: Path) -> None:
    package = tmp_path / "x.deb"
    package.write_bytes(make_deb({"usr/share/doc": b"x"}))

    with pytest.raises(InvalidConfigError, match="holds 0 kernels, one is expected"):
        add_deb(store, package, "0" * 64)


def test_add_deb_of_kernel_package_keeps_its_modules(store: Store, tmp_path: Path) -> None:
    package = tmp_path / "x.deb"
    files = make_kernel_deb("6.1.1")
    package.write_bytes(files)

    entry = add_deb(store, package, "ab" * 32)

    assert entry.id == f"deb-{'ab' * 16}"
    assert (store.kernel_directory(entry.id) / "modules/modules.builtin").is_file()
