"""From an image's configuration and a caller's wishes to the process to run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from casemate.errors import InvalidConfigError
from casemate.images.types import ImageConfig

__all__ = ["DEFAULT_PATH", "ProcessPlan", "compose_process"]

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ProcessPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A process as the agent takes it; ``user`` is still a name."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: str


def compose_process(
    image: ImageConfig,
    *,
    command: Sequence[str] = (),
    entrypoint: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    home: str | None = None,
    terminal: bool = False,
) -> ProcessPlan:
    """Compose the process as Docker does. Does not block.

    Args:
        command: Takes the place of the image's command; empty keeps it.
        entrypoint: Takes the place of the image's entrypoint and drops its command; an empty one only removes it.
        env: On top of the image's; PATH is set when neither does.
        cwd: Absolute; the image's, else ``/``.
        user: The image's when None.
        home: HOME when neither image nor caller sets it.
        terminal: Set TERM when neither does.

    Raises:
        InvalidConfigError: Nothing to run, a relative directory, an environment that can't be (``path``).
    """
    head = image.entrypoint if entrypoint is None else tuple(entrypoint)
    tail = tuple(command) or (image.command if entrypoint is None else ())
    args = (*head, *tail)
    if not args or not args[0]:
        raise InvalidConfigError("no command is given and the image has none", path="command")
    if any("\0" in word for word in args):
        raise InvalidConfigError("a word of the command has a zero byte", path="command")
    # Images are built with relative directories too; they are meant from the root.
    directory = cwd if cwd is not None else "/" + image.working_dir.lstrip("/")
    if not directory.startswith("/") or "\0" in directory:
        raise InvalidConfigError(
            f"working directory is {directory!r}, an absolute path is expected", path="cwd"
        )
    return ProcessPlan(
        args=args,
        env=_environment(image, env or {}, home=home, terminal=terminal),
        cwd=directory,
        user=user if user is not None else image.user or "0",
    )


def _environment(
    image: ImageConfig, given: Mapping[str, str], *, home: str | None, terminal: bool
) -> tuple[str, ...]:
    merged = {"PATH": DEFAULT_PATH}
    if home:
        merged["HOME"] = home
    if terminal:
        merged["TERM"] = "xterm"
    for item in image.env:
        name, equals, value = item.partition("=")
        if name and equals:
            merged[name] = value
    for name, value in given.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidConfigError(
                f"environment variable is {name!r}, a name without '=' and zero bytes is expected",
                path=f"env.{name}",
            )
        merged[name] = value
    return tuple(f"{name}={value}" for name, value in merged.items())
