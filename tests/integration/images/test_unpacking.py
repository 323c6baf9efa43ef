"""Whole images: unpacked, packed, mounted, compared with what another tool makes of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate import _core, images
from casemate.config.settings import Settings
from casemate.errors import ImageError
from casemate.images.rootfs import make_filesystem
from casemate.images.types import Filesystem
from tests.support.oci import TIME, Files, Layout, docker_archive_files, member, sha256, tar

pytestmark = [pytest.mark.root, pytest.mark.erofs]

Tree = dict[str, tuple[object, ...]]


def xattr_member(name: str, value: bytes) -> tarfile.TarInfo:
    info = member(tarfile.REGTYPE, mode=0o644)
    info.pax_headers = {f"SCHILY.xattr.{name}": value.decode("latin-1")}
    return info


LOWER: Files = {
    "./": b"",
    "etc/": b"",
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\napp:x:5:6::/srv:/bin/sh\n",
    "etc/group": b"root:x:0:\naudio:x:29:app\n",
    "bin/": b"",
    "bin/tool": b"#!/bin/sh\n" * 500,
    "bin/tool-link": member(tarfile.LNKTYPE, link="bin/tool"),
    "bin/su": member(tarfile.REGTYPE, mode=0o4755, uid=7, gid=8),
    "lib": member(tarfile.SYMTYPE, link="usr/lib", mode=0o777),
    "usr/": b"",
    "usr/lib/": b"",
    "usr/lib/gone": b"x",
    "data/": b"",
    "data/old/": b"",
    "data/old/file": b"x",
    "data/kept": b"k",
    "swap-dir/": b"",
    "swap-dir/x": b"",
    "swap-file": b"f",
    "dev/": b"",
    "dev/null": member(tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
    "dev/loop": member(tarfile.BLKTYPE, mode=0o660, devmajor=7, devminor=300, gid=6),
    "run/": b"",
    "run/fifo": member(tarfile.FIFOTYPE, mode=0o620),
    "tmp": member(tarfile.DIRTYPE, mode=0o1777),
    "ping": xattr_member("user.note", b"lower"),
    "big-owner": member(tarfile.REGTYPE, mode=0o600, uid=70000, gid=80000),
    "n" * 200 + "/": b"",
    "n" * 200 + "/" + "ü" * 100: b"long",
}
UPPER: Files = {
    "usr/": b"",
    "usr/lib/": b"",
    "usr/lib/.wh.gone": b"",
    "usr/lib/new": b"new",
    "data/": b"",
    "data/.wh..wh..opq": b"",
    "data/fresh": b"y",
    "swap-dir": b"now a file",
    "swap-file/": b"",
    "swap-file/in": b"",
    "bin/": b"",
    "bin/other-link": member(tarfile.LNKTYPE, link="bin/tool"),
    "ping": xattr_member("user.note", b"upper"),
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_root=tmp_path / "cache")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    layout = Layout()
    layout.add_image([LOWER, UPPER], tag="1", compress=True, config={"Cmd": ["/bin/tool"]})
    return layout.write(tmp_path / "app")


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    path.rmdir()


def describe(root: Path) -> Tree:
    """Everything that the kernel says of a tree, by relative path."""
    found: Tree = {}
    inodes: dict[int, str] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        if kind == stat.S_IFREG:
            content = path.read_bytes()
        elif kind == stat.S_IFLNK:
            content = os.readlink(path)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            content = status.st_rdev
        name = str(path.relative_to(root))
        links = "" if kind == stat.S_IFDIR else inodes.setdefault(status.st_ino, name)
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
        }
        found[name] = (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            links,
            content,
            attributes,
        )
    return found


def describe_mounted(rootfs: Path, fstype: str, mount_point: Path) -> Tree:
    """The tree of a filesystem file, mounted in a mount namespace of its own by a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_mount_and_describe, (rootfs, fstype, mount_point))


def _mount_and_describe(rootfs: Path, fstype: str, mount_point: Path) -> Tree:
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_rec_private = 0x00020000, 0x4000 | (1 << 18)
    if libc.unshare(clone_newns) or libc.mount(b"none", b"/", None, ms_rec_private, None):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "-t", fstype, "-o", "loop,ro", rootfs, mount_point], check=True)
    try:
        return describe(mount_point)
    finally:
        subprocess.run(["umount", mount_point], check=True)


def check_tree(tree: Tree) -> None:
    assert "data/old" not in tree and "data/kept" not in tree and "usr/lib/gone" not in tree
    assert not [name for name in tree if ".wh." in name]
    mode, *_, links, content, _ = tree["bin/other-link"]
    assert (mode, links, content) == ("0o100644", "bin/other-link", b"#!/bin/sh\n" * 500)
    assert tree["bin/tool"][4] == tree["bin/tool-link"][4] == "bin/other-link"
    assert tree["bin/su"][:3] == ("0o104755", 7, 8)
    assert tree["big-owner"][:3] == ("0o100600", 70000, 80000)
    assert tree["dev/loop"][5] == os.makedev(7, 300)
    assert tree["ping"][6] == {"user.note": b"upper"}
    assert tree["tmp"][0] == "0o41777"
    assert {entry[3] for entry in tree.values()} == {TIME * 10**9}


def test_resolve_when_layers_have_everything_then_erofs_has_it(
    settings: Settings, layout: Path, mount_point: Path
) -> None:
    phases: list[images.Progress] = []
    image = images.resolve(f"oci:{layout}", settings=settings, progress=phases.append)
    assert (image.name, image.fstype, image.config.command) == ("app:1", "erofs", ("/bin/tool",))
    assert image.rootfs.stat().st_mode & 0o777 == 0o444 and image.rootfs.stat().st_size == image.size_bytes
    check_tree(describe_mounted(image.rootfs, "erofs", mount_point))
    user = images.resolve_user("app", passwd=image.passwd, group=image.group)
    assert (user.uid, user.gid, user.additional_gids) == (5, 6, (29,))
    assert {progress.phase for progress in phases} == {"unpack", "pack"}
    for phase in ("unpack", "pack"):
        last = [progress for progress in phases if progress.phase == phase][-1]
        assert last.done_bytes == last.total_bytes > 0


@pytest.mark.skipif(shutil.which("umoci") is None, reason="needs umoci, an independent unpacker")
def test_resolve_when_unpacked_by_another_tool_then_the_same_tree(
    settings: Settings, layout: Path, tmp_path: Path, mount_point: Path
) -> None:
    image = images.resolve(f"oci:{layout}", settings=settings)
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:1", tmp_path / "bundle"], check=True)
    theirs = describe(tmp_path / "bundle/rootfs")
    assert describe_mounted(image.rootfs, "erofs", mount_point) == theirs


def test_resolve_when_only_mke2fs_is_there_then_ext4_has_the_same(
    settings: Settings, layout: Path, mount_point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from casemate.images import unpack

    monkeypatch.setattr(unpack, "choose_filesystem", lambda: ("ext4", shutil.which("mke2fs")))
    image = images.resolve(f"oci:{layout}", settings=settings)
    assert image.fstype == "ext4"
    tree = describe_mounted(image.rootfs, "ext4", mount_point)
    assert "lost+found" not in tree
    check_tree(tree)


@pytest.mark.parametrize(
    ("fstype", "program", "check"),
    [("erofs", "mkfs.erofs", ["fsck.erofs"]), ("ext4", "mke2fs", ["e2fsck", "-fn"])],
)
def test_make_filesystem_when_made_twice_then_the_same_bytes(
    tmp_path: Path, fstype: Filesystem, program: str, check: list[str]
) -> None:
    found = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert found is not None
    layer = tmp_path / "layer.tar"
    layer.write_bytes(tar(LOWER))
    targets = []
    for number in range(2):
        tree = tmp_path / f"tree{number}"
        tree.mkdir()
        _core.unpack_layer(layer, tree, media_type="", digest=sha256(layer.read_bytes()))
        targets.append(tmp_path / f"rootfs{number}")
        make_filesystem(fstype, found, tree, targets[-1], digest="sha256:x", timeout_s=30)
    assert targets[0].read_bytes() == targets[1].read_bytes()
    subprocess.run([*check, targets[0]], check=True)


def test_resolve_when_archives_then_the_same_tree(
    settings: Settings, tmp_path: Path, mount_point: Path
) -> None:
    layout = Layout()
    layout.add_image([LOWER, UPPER], tag="1")
    layout.write_archive(tmp_path / "oci.tar")
    (tmp_path / "docker.tar").write_bytes(tar(docker_archive_files([LOWER, UPPER])))
    trees = []
    for reference in (f"oci-archive:{tmp_path}/oci.tar", f"{tmp_path}/docker.tar"):
        image = images.resolve(reference, settings=settings)
        trees.append(describe_mounted(image.rootfs, "erofs", mount_point))
        assert images.resolve(reference, settings=settings) == image
    check_tree(trees[0])
    assert trees[0] == trees[1]
    assert [image.name for image in images.list_images(settings)] == ["app:1", "oci:1"]
    for name in ("app:1", "oci:1"):
        images.remove(name, settings)
    assert images.list_images(settings) == []
    assert not os.listdir(settings.cache_root / "images/work")


@pytest.mark.parametrize("damage", ["changed", "gzip cut", "diff_id", "climbs"])
def test_resolve_when_a_layer_is_damaged_then_error_and_nothing_is_left(
    settings: Settings, tmp_path: Path, damage: str
) -> None:
    layout = Layout()
    good: Files = {"a": b"1"}
    if damage == "diff_id":
        layout.add_image([good], rootfs={"diff_ids": [f"sha256:{'0' * 64}"]}, compress=True)
    elif damage == "climbs":
        layout.add_image([good, {"../../escaped": b"x"}])
    elif damage == "gzip cut":
        layout.add_image([good, tar({"b": os.urandom(9000)})], compress=True)
    else:
        layout.add_image([good])
    root = layout.write(tmp_path / "app")
    layers = [path for path in (root / "blobs/sha256").iterdir() if not path.read_bytes().startswith(b"{")]
    if damage == "changed":
        layers[0].write_bytes(layers[0].read_bytes()[:-1] + b"X")
    if damage == "gzip cut":
        largest = max(layers, key=lambda path: path.stat().st_size)
        data = largest.read_bytes()
        largest.write_bytes(data[:-500] + bytes(500))
    with pytest.raises(ImageError) as caught:
        images.resolve(str(root), settings=settings)
    assert caught.value.reference == str(root) and caught.value.digest.startswith("sha256:")
    assert sorted(os.listdir(settings.cache_root / "images")) == ["locks", "work"]
    assert not os.listdir(settings.cache_root / "images/work")
    assert not (tmp_path / "escaped").exists()


def test_resolve_when_two_processes_ask_then_one_unpacks(settings: Settings, layout: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from casemate import images; from casemate.config.settings import Settings\n"
        "told = []\n"
        "image = images.resolve(sys.argv[1], settings=Settings(cache_root=Path(sys.argv[2])), progress=told.append)\n"
        "print(image.digest, any(event.phase != 'wait' for event in told))"
    )
    argv = [sys.executable, "-c", code, f"oci:{layout}", str(settings.cache_root)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({digest for digest, _ in answers}) == 1
    assert [told for _, told in answers].count("True") == 1


def test_resolve_when_a_process_is_killed_then_the_next_one_cleans_up(
    settings: Settings, layout: Path
) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from casemate import images\n"
        "from casemate.config.settings import Settings\n"
        "def die(progress):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "images.resolve(sys.argv[1], settings=Settings(cache_root=Path(sys.argv[2])), progress=die)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", code, f"oci:{layout}", str(settings.cache_root)]
    assert subprocess.run(argv, env=env, timeout=60, check=False).returncode == -9
    work = settings.cache_root / "images/work"
    assert len(os.listdir(work)) == 1
    assert images.list_images(settings) == []
    images.resolve(f"oci:{layout}", settings=settings)
    assert os.listdir(work) == []


def test_resolve_when_progress_raises_then_it_comes_through_and_nothing_is_left(
    settings: Settings, layout: Path
) -> None:
    def stop(progress: images.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images.resolve(f"oci:{layout}", settings=settings, progress=stop)
    assert sorted(os.listdir(settings.cache_root / "images")) == ["locks", "work"]
    assert not os.listdir(settings.cache_root / "images/work")
