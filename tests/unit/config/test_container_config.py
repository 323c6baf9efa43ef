from __future__ import annotations

from typing import Any

import msgspec
import pytest

from casemate.config.container import ContainerConfig
from casemate.errors import InvalidConfigError


@pytest.mark.parametrize(
    ("document", "path", "text"),
    [
        ({}, "image", "missing"),
        ({"image": ""}, "image", "is empty"),
        ({"image": "x", "name": "-a"}, "name", "as 'a0'"),
        ({"image": "x", "command": [""]}, "command[0]", "a program is expected"),
        ({"image": "x", "entrypoint": ["", "a"]}, "entrypoint[0]", "a program is expected"),
        ({"image": "x", "command": ["a\0"]}, "command[0]", "NUL"),
        ({"image": "x", "env": {"A=B": "c"}}, "env", "without '='"),
        ({"image": "x", "env": {"": "c"}}, "env", "without '='"),
        ({"image": "x", "env": {"A": "\0"}}, "env.A", "NUL"),
        ({"image": "x", "cwd": "tmp"}, "cwd", "'/tmp'"),
        ({"image": "x", "user": "a:b:c"}, "user", "uid:gid"),
        ({"image": "x", "user": "a:"}, "user", "uid:gid"),
        ({"image": "x", "user": "4294967295"}, "user", "4294967294"),
        ({"image": "x", "hostname": "a_b"}, "hostname", "labels"),
        ({"image": "x", "cmd": ["a"]}, "cmd", "no known field"),
    ],
)
def test_container_config_when_document_is_bad_then_names_path(
    document: dict[str, Any], path: str, text: str
) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        ContainerConfig.from_document(document)

    assert caught.value.path == path
    assert text in str(caught.value)


def test_container_config_when_command_is_one_text_then_shows_the_list() -> None:
    with pytest.raises(InvalidConfigError, match=r"\['ls', '-l'\]"):
        ContainerConfig(image="x", command="ls -l")


def test_container_config_when_made_from_lists_then_holds_tuples_and_survives_a_document() -> None:
    config = ContainerConfig(
        image="oci:x", command=["sh", "-c", ""], entrypoint=[], env={"A": "=1"}, user="1:www"
    )

    assert config.command == ("sh", "-c", "")
    assert config.entrypoint == ()
    assert ContainerConfig.from_document(msgspec.to_builtins(config)) == config
