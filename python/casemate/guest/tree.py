"""The modules of one kernel as they lie on disk: a directory like ``/lib/modules/<release>``."""

from __future__ import annotations

import os
from pathlib import Path

from casemate.errors import InvalidConfigError
from casemate.guest import compression, elf, modules

__all__ = ["DiskTree", "empty_tree", "open_tree"]

_MAX_MODULE_BYTES = 64 << 20


class DiskTree:
    """Reads modules below ``root``; each is unpacked once."""

    __slots__ = ("_cache", "builtin", "paths", "release", "root")

    def __init__(self, root: Path, release: str, *, config: str = "") -> None:
        """Find the modules below ``root``.

        Args:
            config: The kernel's configuration, for kernels without ``modules.builtin``.
        Blocks: for listing the directory, 10 to 30 ms.
        """
        self.root = root
        self.release = release
        self._cache: dict[str, bytes] = {}
        self.paths = modules.parse_modules_dep(_read_text(root / "modules.dep")) or _find_modules(root)
        self.builtin = modules.parse_builtin(_read_text(root / "modules.builtin")) | builtin_by_config(config)

    def tree(self) -> modules.ModuleTree:
        """What planning needs."""
        return modules.ModuleTree(
            release=self.release, paths=self.paths, builtin=self.builtin, depends=self._depends
        )

    def read(self, path: str) -> bytes:
        """The uncompressed content of the module at ``path`` below the root.

        Raises:
            InvalidConfigError: Missing, damaged or no module; ``path`` is ``kernel``.
        """
        if path not in self._cache:
            self._cache[path] = self._read(path)
        return self._cache[path]

    def read_trimmed(self, path: str) -> bytes:
        """As :meth:`read`, without signature and type information."""
        return modules.trim_module(self.read(path))

    def _read(self, path: str) -> bytes:
        file = self.root / path
        formats = {".xz": "xz", ".gz": "gzip", ".zst": "zstd"}
        try:
            content = file.read_bytes()
            if file.suffix in formats:
                content = compression.decompress(
                    content, form=formats[file.suffix], max_bytes=_MAX_MODULE_BYTES
                )
            elf.read_sections(content)
        except (OSError, InvalidConfigError, elf.ElfError) as exc:
            raise InvalidConfigError(f"kernel module {file} can't be used: {exc}", path="kernel") from exc
        return content

    def _depends(self, name: str) -> tuple[str, ...]:
        return modules.parse_modinfo(self.read(self.paths[name]))


def builtin_by_config(config: str) -> frozenset[str]:
    """Names of needed modules that the configuration text says are built in."""
    options = modules.parse_config(config)
    return frozenset(name for name, option in modules.MODULE_OPTIONS.items() if options.get(option) == "y")


def open_tree(root: Path, release: str, *, config: str = "") -> DiskTree:
    """The modules below ``root``, which must be a directory.

    Raises:
        InvalidConfigError: It is not.
    """
    if not root.is_dir():
        raise InvalidConfigError(f"{root} is not a directory of kernel modules", path="kernel")
    return DiskTree(root, release, config=config)


def empty_tree(release: str, config: str) -> modules.ModuleTree:
    """A kernel without loadable modules. Without a configuration either, it is taken to have everything built in."""
    builtin = builtin_by_config(config) if config else frozenset(modules.MODULE_OPTIONS)
    return modules.ModuleTree(release=release or "unknown", paths={}, builtin=builtin, depends=lambda _: ())


def _find_modules(root: Path) -> dict[str, str]:
    paths: dict[str, str] = {}
    for directory, subdirectories, names in os.walk(root):
        subdirectories.sort()
        for name in sorted(names):
            if name.endswith((".ko", ".ko.xz", ".ko.gz", ".ko.zst")):
                full = os.path.join(directory, name)
                paths.setdefault(modules.normalise_name(name), os.path.relpath(full, root))
    return paths


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
