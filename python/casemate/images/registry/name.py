"""Names of images in registries: ``[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]``. Pure."""

from __future__ import annotations

import re

import msgspec

from casemate.errors import InvalidConfigError

__all__ = ["RegistryName", "is_loopback", "parse_name"]

DOCKER_HUB = "docker.io"
_HUB_NAMES = ("index.docker.io", "registry-1.docker.io")
_MAX_REPOSITORY = 255
_WORD = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_WORD}(?:/{_WORD})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::(\d{{1,5}}))?")


class RegistryName(msgspec.Struct, frozen=True, kw_only=True):
    """An image in a registry, every part filled in.

    Args:
        host: ``docker.io``, ``127.0.0.1:5000``.
        repository: ``library/debian``.
        tag: None when only a digest is given.
        digest: ``sha256:…`` of the manifest or index; it goes before the tag.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def text(self) -> str:
        """The whole name, by which the image is stored: ``docker.io/library/debian:12``, or with ``@`` and the digest."""
        end = f"@{self.digest}" if self.digest is not None else f":{self.tag}"
        return f"{self.host}/{self.repository}{end}"

    @property
    def selector(self) -> str:
        """What the registry is asked for: the digest, else the tag."""
        return self.digest or self.tag or "latest"


def parse_name(text: str, *, default_registry: str) -> RegistryName:
    """The parts of a name, with or without ``docker://`` before it. Does not block.

    The first component is a host when it has a dot or a colon or is ``localhost``. Without one the name is short: its host is
    ``default_registry``. On docker.io a repository of one component is ``library/`` and that. Without tag and digest
    the tag is ``latest``.

    Raises:
        InvalidConfigError: A part has a wrong form, or the name is short and there is no default registry.
    """
    rest = text.removeprefix("docker://")
    rest, at, digest = rest.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _wrong(
            text, f"the digest {digest!r}; sha256: and 64 lower-case hexadecimal digits are expected"
        )
    host, slash, path = rest.partition("/")
    if not slash or not (set(".:") & set(host) or host == "localhost" or host != host.lower()):
        host, path = "", rest
    repository, colon, tag = path.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _wrong(text, f"the tag {tag!r}; up to 128 letters, digits and ._- are expected")
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _MAX_REPOSITORY:
        raise _wrong(text, f"the repository {repository!r}; lower-case letters, digits and ._-/ are expected")
    if not host:
        if not default_registry:
            raise _wrong(text, "no host, and there is no default registry; HOST/NAME[:TAG] is expected")
        host = default_registry
    port = _HOST.fullmatch(host)
    if port is None or int(port[1] or 443) not in range(1, 65536):
        raise _wrong(text, f"the host {host!r}; HOST or HOST:PORT is expected")
    host = DOCKER_HUB if host in _HUB_NAMES else host
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return RegistryName(
        host=host,
        repository=repository,
        tag=tag if colon else None if at else "latest",
        digest=digest if at else None,
    )


def is_loopback(host: str) -> bool:
    """Whether ``host`` (``name``, ``name:port``, ``[::1]:port``) can only be this machine. Does not block."""
    bare = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if bare == "localhost":
        return True
    # Here: every start imports this module, and few ask.
    import ipaddress

    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def _wrong(text: str, what: str) -> InvalidConfigError:
    return InvalidConfigError(f"image name {text!r} has {what}", path="image")
