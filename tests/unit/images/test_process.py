"""The process to run: entrypoint, command, environment, directory, user."""

from __future__ import annotations

import pytest

from casemate.errors import InvalidConfigError
from casemate.images.process import DEFAULT_PATH, compose_process
from casemate.images.types import ImageConfig

IMAGE = ImageConfig(
    entrypoint=("/entry", "-x"),
    command=("serve",),
    env=("PATH=/opt/bin", "A=1", "EMPTY=", "junk"),
    working_dir="srv",
    user="app",
)


@pytest.mark.parametrize(
    ("entrypoint", "command", "args"),
    [
        (None, (), ("/entry", "-x", "serve")),
        (None, ("other", "a b"), ("/entry", "-x", "other", "a b")),
        (("sh",), (), ("sh",)),
        (("sh",), ("-c", "true"), ("sh", "-c", "true")),
        ((), ("ls",), ("ls",)),
    ],
)
def test_compose_process_when_words_are_given_then_as_docker_does(
    entrypoint: tuple[str, ...] | None, command: tuple[str, ...], args: tuple[str, ...]
) -> None:
    assert compose_process(IMAGE, entrypoint=entrypoint, command=command).args == args


def test_compose_process_when_env_is_given_then_on_top_of_the_image() -> None:
    plan = compose_process(IMAGE, env={"A": "2", "B": "x=y"}, home="/srv/app", terminal=True)
    assert plan.env == ("PATH=/opt/bin", "HOME=/srv/app", "TERM=xterm", "A=2", "EMPTY=", "B=x=y")
    assert compose_process(ImageConfig(command=("sh",))).env == (f"PATH={DEFAULT_PATH}",)


def test_compose_process_when_directory_and_user_then_caller_before_image() -> None:
    assert (compose_process(IMAGE).cwd, compose_process(IMAGE).user) == ("/srv", "app")
    plan = compose_process(IMAGE, cwd="/tmp", user="0:0")
    assert (plan.cwd, plan.user) == ("/tmp", "0:0")
    plan = compose_process(ImageConfig(command=("sh",)))
    assert (plan.cwd, plan.user) == ("/", "0")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"entrypoint": ()}, "command"),
        ({"command": ("a\0b",)}, "command"),
        ({"cwd": "tmp"}, "cwd"),
        ({"env": {"A=B": "1"}}, "env.A=B"),
        ({"env": {"": "1"}}, "env."),
        ({"env": {"A": "\0"}}, "env.A"),
    ],
)
def test_compose_process_when_it_can_not_run_then_error_names_the_place(
    changes: dict[str, object], path: str
) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        compose_process(IMAGE, **changes)  # type: ignore[arg-type]
    assert caught.value.path == path
