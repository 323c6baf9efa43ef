from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from casemate.errors import InvalidConfigError
from casemate.guest.modules import ModuleSet, plan_modules
from casemate.guest.tree import DiskTree, empty_tree, open_tree
from tests.support.guest_files import make_module


def _write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_read_of_module_unpacks_it(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    module = make_module("virtio_rng", "virtio")
    _write(tmp_path, f"kernel/drivers/virtio-rng.ko{suffix}", pack(module))
    tree = DiskTree(tmp_path, "6.1")

    assert tree.read(tree.paths["virtio_rng"]) == module
    assert list(tree.tree().depends("virtio_rng")) == ["virtio"]


def test_tree_with_modules_dep_follows_it(tmp_path: Path) -> None:
    _write(tmp_path, "kernel/a.ko", make_module("a"))
    _write(tmp_path, "updates/a.ko", make_module("a", "b"))
    _write(tmp_path, "modules.dep", b"updates/a.ko: updates/b.ko\n")

    assert DiskTree(tmp_path, "6.1").paths == {"a": "updates/a.ko"}


def test_tree_reads_built_in_modules_from_list_and_configuration(tmp_path: Path) -> None:
    _write(tmp_path, "modules.builtin", b"kernel/fs/fuse/virtiofs.ko\n")

    tree = DiskTree(tmp_path, "6.1", config="CONFIG_EROFS_FS=y\nCONFIG_OVERLAY_FS=m\n").tree()

    assert tree.has("virtiofs")
    assert tree.has("erofs")
    assert not tree.has("overlay")


@pytest.mark.parametrize("content", [b"", b"text", lzma.compress(make_module("a"))[:-20]])
def test_read_of_damaged_module_names_the_file(content: bytes, tmp_path: Path) -> None:
    _write(tmp_path, "kernel/a.ko.xz", content)

    with pytest.raises(InvalidConfigError, match=r"kernel module .*kernel/a\.ko\.xz can't be used"):
        DiskTree(tmp_path, "6.1").read("kernel/a.ko.xz")


def test_open_tree_of_missing_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="not a directory of kernel modules"):
        open_tree(tmp_path / "none", "6.1")


def test_empty_tree_without_configuration_has_all_built_in() -> None:
    plan = plan_modules(
        ModuleSet(("virtio_pci",), ("erofs", "overlay"), ("virtio_net",)), empty_tree("6.6", "")
    )

    assert plan.all == ()


def test_empty_tree_with_configuration_has_what_it_says() -> None:
    tree = empty_tree("6.6", "CONFIG_EROFS_FS=y\nCONFIG_OVERLAY_FS=m\n")

    assert (tree.has("erofs"), tree.has("overlay")) == (True, False)
