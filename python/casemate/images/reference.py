"""What a caller may write to name an image. Pure: nothing is looked up here."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Literal

import msgspec

from casemate.errors import InvalidConfigError

__all__ = ["Reference", "ReferenceKind", "default_name", "normalise_name", "parse_reference"]

ReferenceKind = Literal["oci", "oci-archive", "docker-archive", "docker", "any"]

_PREFIXES: tuple[ReferenceKind, ...] = ("oci", "oci-archive", "docker-archive")
_FOREIGN = ("docker-daemon", "containers-storage", "dir", "http", "https", "registry")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:/@+-]{0,254}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,254}")
_ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".oci", ".docker")


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed reference.

    Args:
        text: As it was given.
        kind: Form of the image; ``docker`` for one in a registry, or ``any``: an existing path, else the name or digest of a
            stored image.
        path: Path, for ``docker`` the name in its registry, or the whole text for ``any``.
        tag: Which image of a layout or archive; None for its only one.
    """

    text: str
    kind: ReferenceKind
    path: str
    tag: str | None = None


def parse_reference(text: str) -> Reference:
    """Parse ``docker://NAME``, ``oci:PATH[:TAG]``, ``oci-archive:PATH[:TAG]``, ``docker-archive:PATH[:TAG]``, a path or a name.

    The path of a prefixed form ends at its first colon; a path with colons can be given bare. Does not block.

    Raises:
        InvalidConfigError: The form is wrong.
    """
    if not text or "\0" in text:
        raise InvalidConfigError(f"image reference is {text!r}, a path or a name is expected", path="image")
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES:
        path, colon, tag = rest.partition(":")
        if not path:
            raise InvalidConfigError(
                f"image reference {text!r} has no path, {prefix}:PATH[:TAG] is expected", path="image"
            )
        if colon and not _TAG.fullmatch(tag):
            raise InvalidConfigError(
                f"image reference {text!r} has the tag {tag!r}; letters, digits and ._:/@+- are expected",
                path="image",
            )
        kind = _PREFIXES[_PREFIXES.index(prefix)]
        return Reference(text=text, kind=kind, path=path, tag=tag if colon else None)
    if prefix == "docker" and rest.startswith("//"):
        # Its parts depend on the default registry, so they are told apart by who knows it.
        return Reference(text=text, kind="docker", path=rest.removeprefix("//"))
    if colon and (prefix in _FOREIGN and rest.startswith(("/", "."))):
        raise InvalidConfigError(
            f"image reference {text!r} has the form {prefix!r}, docker://NAME or one of {', '.join(_PREFIXES)} is expected",
            path="image",
        )
    return Reference(text=text, kind="any", path=text)


def is_name(text: str) -> bool:
    """Whether ``text`` could be the name of a stored image. Does not block."""
    return _NAME.fullmatch(text) is not None


def normalise_name(text: str) -> str:
    """``name`` → ``name:latest``; a name with a tag or digest stays. Does not block."""
    last = text.rpartition("/")[2]
    return text if ":" in last or "@" in last else f"{text}:latest"


def default_name(path: str, tag: str | None) -> str:
    """Name for an image found at ``path`` under ``tag``: a tag that is a whole name stands for itself. Does not block."""
    if tag and (":" in tag or "/" in tag):
        return normalise_name(tag)
    base = PurePath(path).name
    for suffix in _ARCHIVE_SUFFIXES:
        base = base.removesuffix(suffix)
    base = re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("-._") or "image"
    return f"{base}:{tag or 'latest'}"
