"""Small kernels, modules and packages, as whole as the real ones in what casemate looks at."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = [
    "SIGNATURE",
    "make_bzimage",
    "make_deb",
    "make_elf",
    "make_kernel_deb",
    "make_module",
    "make_note",
    "make_vmlinux",
    "write_fake_apt",
]

SIGNATURE = b"signature" * 8 + struct.pack(">8xI", 72) + b"~Module signature appended~\n"


def make_note(name: bytes = b"Xen\0", kind: int = 18, body: bytes = b"\x00\x00\x00\x01") -> bytes:
    """One ELF note."""
    padded_name = name + bytes(-len(name) % 4)
    return struct.pack("<III", len(name), len(body), kind) + padded_name + body + bytes(-len(body) % 4)


def make_elf(
    sections: Mapping[str, bytes] | None = None, segments: Sequence[tuple[int, bytes]] = ()
) -> bytes:
    """An x86-64 ELF file with these sections and program segments."""
    sections = {"": b"", **(sections or {}), ".shstrtab": b""}
    names = b"".join(name.encode() + b"\0" for name in sections)
    sections[".shstrtab"] = names
    position = 64 + 56 * len(segments)
    programs, blobs = b"", b""
    for kind, content in segments:
        programs += struct.pack("<IIQQQQQQ", kind, 4, position, 0, 0, len(content), len(content), 4)
        blobs += content
        position += len(content)
    rows, name_index = b"", 0
    for name, content in sections.items():
        kind = 3 if name == ".shstrtab" else 1 if name else 0
        rows += struct.pack("<IIQQQQIIQQ", name_index, kind, 0, 0, position, len(content), 0, 0, 1, 0)
        blobs += content
        position += len(content)
        name_index += len(name) + 1
    count = len(sections)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, 62, 1, 0, 64, position, 0, 64, 56, len(segments), 64, count, count - 1
    )
    return header + programs + blobs + rows


def make_vmlinux(release: str = "6.12.1-test", *, pvh: bool = True, filler: int = 4096) -> bytes:
    """A kernel that says its release and, with ``pvh``, has the entry point."""
    text = f"Linux version {release} (a@b)\n".encode() + bytes(filler)
    segments = [(1, text), *([(4, make_note())] if pvh else [])]
    return make_elf(segments=segments)


def make_bzimage(vmlinux: bytes, *, form: str = "xz", release: str = "6.12.1-test") -> bytes:
    """A bzImage around ``vmlinux``, compressed by the standard library."""
    if form == "gzip":
        payload = gzip.compress(vmlinux, mtime=0)
    elif form == "xz":
        payload = lzma.compress(vmlinux, check=lzma.CHECK_CRC32) + struct.pack("<I", len(vmlinux))
    else:
        payload = form.encode() + struct.pack("<I", len(vmlinux))
    setup = bytearray(512 * 4)
    body = bytes(64) + payload
    body += bytes(-len(body) % 16)
    setup[0x1F1] = 3
    struct.pack_into("<I", setup, 0x1F4, len(body) // 16)
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    struct.pack_into("<H", setup, 0x20E, 0x300)
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    setup[0x500 : 0x500 + 64] = f"{release} (a@b) #1".encode().ljust(64, b"\0")
    return bytes(setup) + body


def make_module(name: str, depends: str = "", *, softdep: str = "", signed: bool = True) -> bytes:
    """A kernel module with ``.modinfo``, type information and, when ``signed``, an appended signature."""
    fields = ["license=GPL", f"depends={depends}", f"name={name}"]
    if softdep:
        fields.append(f"softdep={softdep}")
    info = b"".join(field.encode() + b"\0" for field in fields)
    module = make_elf({".text": b"\x90" * 16, ".modinfo": info, ".BTF": b"\x9f\xeb" * 8})
    return module + SIGNATURE if signed else module


def make_deb(files: Mapping[str, bytes]) -> bytes:
    """A Debian package with these files."""

    def member(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return header + content + bytes(len(content) % 2)

    def tar(entries: Mapping[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:xz") as archive:
            for name, content in entries.items():
                entry = tarfile.TarInfo(f"./{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return stream.getvalue()

    control = tar({"control": b"Package: test\nVersion: 1\nArchitecture: amd64\n"})
    return b"!<arch>\n" + b"".join(
        (
            member("debian-binary", b"2.0\n"),
            member("control.tar.xz", control),
            member("data.tar.xz", tar(files)),
        )
    )


MODULES: Mapping[str, tuple[str, str]] = {
    "virtio_ring": ("drivers/virtio", ""),
    "virtio": ("drivers/virtio", "virtio_ring"),
    "virtio_pci": ("drivers/virtio", "virtio,virtio_ring"),
    "virtio_mmio": ("drivers/virtio", "virtio,virtio_ring"),
    "vsock": ("net/vmw_vsock", ""),
    "vmw_vsock_virtio_transport": ("net/vmw_vsock", "vsock,virtio"),
    "virtio_blk": ("drivers/block", "virtio"),
    "erofs": ("fs/erofs", ""),
    "overlay": ("fs/overlayfs", ""),
    "virtio-rng": ("drivers/char", "virtio"),
}
"""Folder and dependencies of each module of :func:`make_kernel_deb`."""


def module_files(base: str) -> dict[str, bytes]:
    """The tree of modules below ``base``, xz-compressed."""
    return {
        f"{base}/kernel/{folder}/{name}.ko.xz": lzma.compress(make_module(name.replace("-", "_"), depends))
        for name, (folder, depends) in MODULES.items()
    } | {f"{base}/modules.builtin": b"kernel/fs/ext4/ext4.ko\n"}


def make_kernel_deb(release: str) -> bytes:
    """A kernel package with a bzImage, its configuration and modules."""
    return make_deb(
        {
            f"boot/vmlinuz-{release}": make_bzimage(make_vmlinux(release), release=release),
            f"boot/config-{release}": b"CONFIG_MODULES=y\n",
            **module_files(f"lib/modules/{release}"),
        }
    )


def write_fake_apt(directory: Path, releases: Sequence[str], *, lists: bool = True) -> Path:
    """``apt-cache`` and ``apt-get`` that offer kernel packages of ``releases``; return the log of what was asked.

    Without ``lists`` nothing is offered until ``apt-get update`` was run.
    """
    directory.mkdir(exist_ok=True)
    log = directory / "log"
    log.touch()
    ready = directory / "lists"
    if lists:
        ready.touch()
    search, show = "", ""
    for release in releases:
        package = f"linux-image-{release}"
        (directory / f"{package}.deb").write_bytes(make_kernel_deb(release))
        search += f"{package} - Linux\n{package}-dbg - symbols\n"
        show += f"Package: {package}\nVersion: {release}-1\nFilename: pool/{package}.deb\nSize: 1000\n\n"
    (directory / "search.txt").write_text(search)
    (directory / "show.txt").write_text(show)
    scripts = {
        "apt-cache": f"""
            [ -e {ready} ] || exit 0
            case "$1" in search) cat {directory}/search.txt ;; show) cat {directory}/show.txt ;; esac
            """,
        "apt-get": f"""
            status=
            while [ $# -gt 0 ]; do case "$1" in
              -o) case "$2" in APT::Status-Fd=*) status="${{2#*=}}" ;; esac; shift 2 ;;
              -q) shift ;;
              update) touch {ready}; exit 0 ;;
              download) shift; break ;;
              *) shift ;;
            esac; done
            for wanted; do
              name="${{wanted%%=*}}"
              if [ ! -e "{directory}/$name.deb" ]; then echo "E: Unable to fetch $name: 404" >&2; exit 100; fi
              [ -z "$status" ] || echo dlstatus:1:50.0:Retrieving >/dev/fd/$status
              cp "{directory}/$name.deb" .
            done
            """,
    }
    for name, body in scripts.items():
        path = directory / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n{body}')
        path.chmod(0o755)
    return log
