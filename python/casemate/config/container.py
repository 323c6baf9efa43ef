"""What a container shall be: its image, its command and how it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from casemate.config import _checks
from casemate.errors import InvalidConfigError

__all__ = ["ContainerConfig"]


class ContainerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One container.

    Args:
        image: Reference, as ``oci:DIRECTORY[:TAG]``, ``oci-archive:FILE``, ``docker-archive:FILE``.
        name: 2 to 64 letters, digits, ``_.-``; None: one is made up.
        command: In place of the image's command; None: the image's.
        entrypoint: In place of the image's entry point; ``()`` for none; None: the image's.
        env: Variables over those of the image.
        cwd: Absolute directory; None: the image's, else ``/``.
        user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; None: the image's, else root.
        terminal: Give it a terminal; stderr then goes into stdout.
        readonly_rootfs: No writable layer.
        hostname: Own host name; None: the sandbox's.
        annotations: Kept with the container, as OCI annotations.

    Raises:
        InvalidConfigError: A value without meaning; ``path`` names the field.
    """

    image: str
    name: str | None = None
    command: Sequence[str] | None = None
    entrypoint: Sequence[str] | None = None
    env: Mapping[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    terminal: bool = False
    readonly_rootfs: bool = False
    hostname: str | None = None
    annotations: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        _checks.check_file_path("image", self.image)
        if self.name is not None:
            _checks.check_name("name", self.name)
        for name in ("command", "entrypoint"):
            words = getattr(self, name)
            if words is not None:
                msgspec.structs.force_setattr(self, name, _checks.check_words(name, words))
        if self.command and not self.command[0] and not self.entrypoint:
            raise InvalidConfigError("command[0] is empty, a program is expected", path="command[0]")
        if self.entrypoint and not self.entrypoint[0]:
            raise InvalidConfigError("entrypoint[0] is empty, a program is expected", path="entrypoint[0]")
        _checks.check_pairs("env", self.env)
        _checks.check_pairs("annotations", self.annotations)
        if self.cwd is not None:
            _checks.check_absolute_path("cwd", self.cwd)
        if self.hostname is not None:
            _checks.check_hostname("hostname", self.hostname)
        if self.user is not None:
            _check_user(self.user)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> ContainerConfig:
        """From a decoded TOML or JSON table; types are checked too. Raises: InvalidConfigError with the field's path."""
        return _checks.convert_document(document, cls)


def _check_user(user: str) -> None:
    _checks.check_file_path("user", user)
    parts = user.split(":")
    if len(parts) > 2 or not all(parts) or any(character.isspace() for character in user):
        raise InvalidConfigError(
            f"user is {user!r}, 'name', 'uid', 'name:group' or 'uid:gid' is expected, as '1000:1000'",
            path="user",
        )
    for part in parts:
        if part.isdigit() and int(part) > 2**32 - 2:
            raise InvalidConfigError(f"user is {user!r}, ids from 0 to 4294967294 are possible", path="user")
