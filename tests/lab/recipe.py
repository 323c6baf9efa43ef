"""What the lab's image is made of, and the name under which it is kept. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["MODULES", "PACKAGES", "Recipe", "image_key", "parse_policy"]

# Raise it when what is built changes in a way that the key does not see.
VERSION = 1

PACKAGES = (
    *("base-files", "bash", "coreutils", "grep", "sed", "util-linux", "mount", "procps"),
    *("python3", "busybox-static", "kmod", "iproute2", "nftables"),
    *("qemu-system-x86", "erofs-utils", "e2fsprogs", "dmsetup"),
)
"""Debian packages of the image, which come with what they depend on."""

WATCHED = (*PACKAGES, "libc6", "libglib2.0-0", "python3.11-minimal", "qemu-system-common", "seabios")
"""Packages whose versions stand for the image's: a newer one of these makes a new image."""

MODULES = (
    "virtio_blk",
    *("kvm_amd", "vhost_vsock", "vhost_net", "vsock_loopback"),
    *("tun", "veth", "bridge", "macvlan", "macvtap", "ipvlan"),
    *("overlay", "loop", "erofs", "dm_mod", "vfio_pci", "vfio_iommu_type1"),
)
"""Kernel modules that are loaded when the lab starts, and lie unpacked in the image."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One image.

    Args:
        suite: Debian's release.
        versions: Version of each watched package that is known, by name.
        kernel_id: Of the kernel in the cache of guest assets.
        init: The lab's process 1.
    """

    suite: str
    versions: Mapping[str, str]
    kernel_id: str
    init: bytes
    packages: Sequence[str] = PACKAGES
    modules: Sequence[str] = MODULES


def image_key(recipe: Recipe) -> str:
    """Name of the image: equal for equal content."""
    document = msgspec.json.encode(
        {
            "version": VERSION,
            "suite": recipe.suite,
            "packages": list(recipe.packages),
            "modules": list(recipe.modules),
            "versions": sorted(recipe.versions.items()),
            "kernel": recipe.kernel_id,
            "init": hashlib.sha256(recipe.init).hexdigest(),
        }
    )
    return f"{recipe.suite}-{hashlib.sha256(document).hexdigest()[:16]}"


def parse_policy(text: str) -> dict[str, str]:
    """Version that would be installed of each package in what ``apt-cache policy`` printed; those without one are left out."""
    versions: dict[str, str] = {}
    package = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            package = line.rstrip(":")
        elif line.startswith("  Candidate: ") and not line.endswith("(none)"):
            versions[package] = line.removeprefix("  Candidate: ")
    return versions
