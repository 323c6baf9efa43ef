"""From what a caller wishes to the process that the agent is told to run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from casemate.agent.messages import ProcessSpec, User
from casemate.agent.spec import build_process
from casemate.errors import InvalidConfigError
from casemate.images import compose_process, resolve_user

if TYPE_CHECKING:
    from casemate.config.container import ContainerConfig
    from casemate.images import Image

__all__ = ["container_process", "exec_process"]


def container_process(image: Image, config: ContainerConfig) -> ProcessSpec:
    """The first process of a container. Does not block.

    Raises:
        InvalidConfigError: There is nothing to run, or the user is unknown in the image (``path``).
    """
    wished = config.user if config.user is not None else image.config.user
    user = resolve_user(wished, passwd=image.passwd, group=image.group)
    plan = compose_process(
        image.config,
        command=config.command or (),
        entrypoint=config.entrypoint,
        env=config.env,
        cwd=config.cwd,
        home=user.home,
        terminal=config.terminal,
    )
    identity = User(uid=user.uid, gid=user.gid, additional_gids=user.additional_gids)
    return build_process(plan.args, plan.env, plan.cwd, identity, terminal=config.terminal)


def exec_process(
    image: Image | None,
    first: ProcessSpec,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | None,
    user: str | None,
    terminal: bool,
) -> ProcessSpec:
    """Another process of a container whose first one is ``first``. Does not block.

    Args:
        image: The container's image, for names of users; None when it is not at hand.

    Raises:
        InvalidConfigError: The command is empty, or the user is unknown in the image (``path``).
    """
    args = tuple(command)
    if not args or not args[0]:
        raise InvalidConfigError("exec needs a command", path="command")
    identity, home = first.user, None
    if user is not None:
        passwd, group = (image.passwd, image.group) if image is not None else ("", "")
        resolved = resolve_user(user, passwd=passwd, group=group)
        identity = User(uid=resolved.uid, gid=resolved.gid, additional_gids=resolved.additional_gids)
        home = resolved.home
    merged = dict(entry.partition("=")[::2] for entry in first.env)
    if home is not None:
        merged["HOME"] = home
    merged.update(env)
    words = tuple(f"{name}={value}" for name, value in merged.items())
    return build_process(args, words, cwd if cwd is not None else first.cwd, identity, terminal=terminal)
