from __future__ import annotations

from pathlib import Path

import pytest

from casemate.errors import UnsupportedError
from casemate.guest.host import find_host_kernel
from tests.support.guest_files import make_bzimage, make_vmlinux, module_files


class _Host:
    def __init__(self, root: Path) -> None:
        self.boot, self.modules = root / "boot", root / "modules"
        self.boot.mkdir()
        self.modules.mkdir()

    def add_image(self, release: str, config: str = "") -> None:
        (self.boot / f"vmlinuz-{release}").write_bytes(make_bzimage(make_vmlinux(release), release=release))
        if config:
            (self.boot / f"config-{release}").write_text(config)

    def add_modules(self, release: str, *, without: str = "-none-") -> None:
        for name, content in module_files(release).items():
            if without not in name:
                path = self.modules / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def find(self, running: str = "none", machine: str = "q35") -> str:
        found = find_host_kernel(machine=machine, boot=self.boot, modules_root=self.modules, running=running)
        return found.release


@pytest.fixture
def host(tmp_path: Path) -> _Host:
    return _Host(tmp_path)


def test_find_host_kernel_takes_the_running_one_first(host: _Host) -> None:
    for release in ("6.1.1", "6.12.1"):
        host.add_image(release)
        host.add_modules(release)

    assert host.find(running="6.1.1") == "6.1.1"
    assert host.find() == "6.12.1"


def test_find_host_kernel_when_the_newest_lacks_a_module_takes_an_older_one(host: _Host) -> None:
    for release in ("6.1.1", "6.12.1"):
        host.add_image(release)
    host.add_modules("6.1.1")
    host.add_modules("6.12.1", without="erofs")

    assert host.find() == "6.1.1"


def test_find_host_kernel_when_none_suffices_says_what_each_lacks(host: _Host) -> None:
    host.add_image("6.1.1")
    host.add_modules("6.1.1", without="vmw_vsock_virtio_transport")
    host.add_image("6.12.1")

    with pytest.raises(UnsupportedError) as caught:
        host.find()

    text = str(caught.value)
    assert "6.1.1: kernel 6.1.1 lacks vmw_vsock_virtio_transport" in text
    assert "6.12.1: neither" in text


def test_find_host_kernel_with_everything_built_in_needs_no_modules(host: _Host) -> None:
    options = ("VIRTIO_PCI", "VIRTIO_VSOCKETS", "VIRTIO_BLK", "EROFS_FS", "OVERLAY_FS")
    host.add_image("6.6.1", "".join(f"CONFIG_{option}=y\n" for option in options))

    assert host.find() == "6.6.1"
    with pytest.raises(UnsupportedError, match="lacks virtio_mmio"):
        host.find(machine="microvm")


def test_find_host_kernel_whose_image_is_cut_is_not_taken(host: _Host) -> None:
    host.add_image("6.1.1")
    host.add_modules("6.1.1")
    image = host.boot / "vmlinuz-6.1.1"
    image.write_bytes(image.read_bytes()[:-100])

    with pytest.raises(UnsupportedError, match="cut short"):
        host.find()


def test_find_host_kernel_on_a_host_without_any_names_the_cure(host: _Host) -> None:
    with pytest.raises(UnsupportedError, match="--kernel /path/to/vmlinux"):
        host.find()
