"""Images crafted to reach outside of their tree, and an unpacker that lets them: the proof that a test of ours can fail."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.oci import Files, member, tar

__all__ = ["IMAGES", "LIMIT_BYTES", "UP", "Crafted", "Scratch", "link", "packed", "unpack_naively"]

UP = "../../../../.."
"""From the tree to the scratch root, in the store as in :class:`Scratch`."""

LIMIT_BYTES = 16 << 20


class Scratch:
    """A root of a test's own: ``victim`` holds what nobody may touch, ``tree`` lies as deep as a tree in the store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.victim = root / "victim"
        self.tree = root / "naive/images/work/one/tree"
        self.tree.mkdir(parents=True)
        (self.tree.parent / "neighbour").mkdir()
        (self.tree.parent / "neighbour/kept").write_bytes(b"kept")
        (self.victim / "directory").mkdir(parents=True)
        (self.victim / "secret").write_bytes(b"the host's own")
        (self.victim / "directory/inner").write_bytes(b"inner")
        for path in (self.victim, *self.victim.rglob("*")):
            os.utime(path, (1_000_000_000,) * 2)

    def outside(self) -> dict[str, tuple[object, ...]]:
        """Everything below the root that is in no tree: kind, owner, times, links, content."""
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted(self.root.rglob("*")):
            if self.tree in (path, *path.parents) or self.root / "cache" in (path, *path.parents):
                continue
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            # Times of the directories on the way to the tree are the unpacker's business.
            changed = (0, 0) if path in self.tree.parents else (status.st_mtime_ns, status.st_ctime_ns)
            found[str(path.relative_to(self.root))] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                0 if path in self.tree.parents else status.st_nlink,
                changed,
                content,
            )
        return found


@dataclass(frozen=True)
class Crafted:
    """One image.

    Args:
        layers: From the scratch root, which absolute names need.
        refused: Words of our error; empty: the image is taken.
        inside: Then a name in the tree that must be there; ``%`` stands for the victim's path.
        harm: What the naive unpacker does, where it is not a change outside.
    """

    layers: Callable[[Scratch], Sequence[Files | bytes]]
    refused: str = ""
    inside: str = ""
    harm: type[BaseException] | None = None


def link(target: str) -> tarfile.TarInfo:
    return member(tarfile.SYMTYPE, link=target, mode=0o777)


def hard(target: str) -> tarfile.TarInfo:
    return member(tarfile.LNKTYPE, link=target)


def several(*members: tuple[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar in which a name may come more than once."""
    return b"".join(_records(name, content) for name, content in members) + bytes(2 * tarfile.BLOCKSIZE)


def _records(name: str, content: bytes | tarfile.TarInfo) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = content if isinstance(content, tarfile.TarInfo) else member(tarfile.REGTYPE, mode=0o644)
        info.name = name.rstrip("/")
        if isinstance(content, bytes):
            info.size = len(content)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
        archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
        # Before the archive is closed: without the mark of its end.
        return output.getvalue()


def _declared(size_bytes: int) -> bytes:
    """A file that says it has that many bytes, and has eight."""
    info = member(tarfile.REGTYPE, mode=0o644)
    info.name, info.size = "huge", size_bytes
    return info.tobuf(tarfile.GNU_FORMAT) + b"eight...".ljust(512, b"\0") + bytes(1024)


def _holes(size_bytes: int) -> bytes:
    """A file of one block whose map says that it is mostly holes."""
    info = member(tarfile.REGTYPE, mode=0o644)
    info.name = "holes"
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": "holes",
        "GNU.sparse.size": str(size_bytes),
        "GNU.sparse.numblocks": "1",
        "GNU.sparse.map": "0,512",
    }
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info.size = 512
        archive.addfile(info, io.BytesIO(bytes(512)))
    return output.getvalue()


IMAGES: dict[str, Crafted] = {
    "a name that climbs": Crafted(lambda _: [{f"{UP}/victim/planted": b"x"}], refused="`..`"),
    "a name that climbs from inside": Crafted(
        lambda _: [{"a/": b"", f"a/../{UP}/victim/planted": b"x"}], refused="`..`"
    ),
    "an absolute name": Crafted(lambda s: [{f"{s.victim}/planted": b"x"}], inside="%/planted"),
    "a directory that is an absolute link": Crafted(
        lambda s: [several(("out", link(str(s.victim))), ("out/planted", b"x"))], inside="%/planted"
    ),
    "a directory that is a relative link": Crafted(
        lambda _: [several(("out", link(f"{UP}/victim")), ("out/planted", b"x"))], inside="victim/planted"
    ),
    "a chain of links": Crafted(
        lambda s: [
            several(("a", link("b")), ("b", link("c")), ("c", link(str(s.victim))), ("a/planted", b"x"))
        ],
        inside="%/planted",
    ),
    "a link into /proc": Crafted(
        lambda s: [several(("out", link(f"/proc/self/root{s.victim}")), ("out/planted", b"x"))],
        inside="proc/self/root%/planted",
    ),
    "a link of the lower layer": Crafted(
        lambda s: [{"etc": link(str(s.victim))}, {"etc/secret": b"mine now"}], inside="%/secret"
    ),
    "a link with the name of a file": Crafted(
        lambda _: [several(("log", link(f"{UP}/victim/secret")), ("log", b"mine now"))], inside="log"
    ),
    "a directory replaced by a link": Crafted(
        lambda s: [several(("d/", b""), ("d", link(str(s.victim))), ("d/planted", b"x"))], inside="%/planted"
    ),
    "a link replaced by a directory": Crafted(
        lambda s: [several(("d", link(str(s.victim))), ("d", member(tarfile.DIRTYPE, mode=0o777)))],
        inside="d",
    ),
    "a hard link that climbs": Crafted(
        lambda _: [several(("x", hard(f"{UP}/victim/secret")), ("x", b"mine now"))], refused="`..`"
    ),
    "a hard link to an absolute name": Crafted(
        lambda s: [several(("x", hard(f"{s.victim}/secret")), ("x", b"mine now"))], refused="hard link"
    ),
    "a hard link through a link": Crafted(
        lambda s: [several(("d", link(str(s.victim))), ("x", hard("d/secret")))], refused="hard link"
    ),
    "a hard link to a link": Crafted(
        lambda s: [several(("s", link(f"{s.victim}/secret")), ("h", hard("s")), ("h", b"mine now"))],
        inside="h",
    ),
    "a device through a link": Crafted(
        lambda s: [
            several(
                ("dev", link(str(s.victim))),
                ("dev/node", member(tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)),
            )
        ],
        inside="%/node",
    ),
    "an owner for what a link leads to": Crafted(
        lambda s: [
            {"s": member(tarfile.SYMTYPE, link=f"{s.victim}/secret", mode=0o777, uid=12345, gid=12345)}
        ],
        inside="s",
    ),
    "a whiteout that climbs": Crafted(
        lambda _: [{"a": b""}, {f"{UP}/victim/.wh.secret": b""}], refused="`..`"
    ),
    "a whiteout of the parent": Crafted(lambda _: [{"a": b""}, {".wh...": b""}], refused="whiteout"),
    "a whiteout through a link": Crafted(
        lambda s: [{"d": link(str(s.victim))}, {"d/.wh.secret": b""}], inside="d"
    ),
    "an opaque mark through a link": Crafted(
        lambda s: [{"d": link(f"{UP}/victim")}, {"d/.wh..wh..opq": b""}], inside="d"
    ),
    "a size of 64 TiB": Crafted(
        lambda _: [_declared(1 << 46)], refused="more than 16777216 bytes", harm=MemoryError
    ),
    "a bomb": Crafted(
        lambda _: [tar({"zeros": bytes(4 * LIMIT_BYTES)})],
        refused="more than 16777216 bytes",
        harm=BufferError,
    ),
    "a file of holes": Crafted(
        lambda _: [_holes(4 * LIMIT_BYTES)], refused="more than 16777216 bytes", harm=BufferError
    ),
}


def unpack_naively(layers: Sequence[bytes], tree: Path) -> None:
    """Unpack as a first draft would: names joined to the tree, links followed, sizes believed.

    Raises BufferError when more came out than :data:`LIMIT_BYTES`, which nothing stopped.
    """
    for layer in layers:
        with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
            for info in archive:
                _put(archive, info, os.path.join(tree, info.name), tree)
    if sum(path.lstat().st_size for path in tree.rglob("*")) > LIMIT_BYTES:
        raise BufferError("nothing bounded it")


def _put(archive: tarfile.TarFile, info: tarfile.TarInfo, path: str, tree: Path) -> None:
    parent, name = os.path.split(path)
    if name.startswith(".wh."):
        gone = Path(parent) / name.removeprefix(".wh.")
        for each in Path(parent).iterdir() if name == ".wh..wh..opq" else [gone]:
            shutil.rmtree(
                each, ignore_errors=True
            ) if each.is_dir() and not each.is_symlink() else each.unlink()
        return
    Path(parent).mkdir(parents=True, exist_ok=True)
    if info.isdir():
        Path(path).mkdir(parents=True, exist_ok=True)
    elif info.issym():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
        Path(path).symlink_to(info.linkname)
    elif info.islnk():
        os.link(os.path.join(tree, info.linkname), path, follow_symlinks=False)
    elif info.ischr():
        os.mknod(path, stat.S_IFCHR | info.mode, os.makedev(info.devmajor, info.devminor))
    else:
        buffer = bytearray(info.size)
        source = archive.extractfile(info)
        assert source is not None
        buffer[:] = source.read()
        Path(path).write_bytes(buffer)
    with contextlib.suppress(FileNotFoundError):
        os.chown(path, info.uid, info.gid)
        if not info.issym():
            os.chmod(path, info.mode)


def packed(layer: Files | bytes) -> bytes:
    """The layer as a tar."""
    return layer if isinstance(layer, bytes) else tar(layer)
