"""Settings about registries from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError


def test_from_environment_when_registries_are_named_then_in_their_forms() -> None:
    settings = Settings.from_environment(
        {
            "CASEMATE_DEFAULT_REGISTRY": "",
            "CASEMATE_REGISTRY_MIRRORS": "docker.io=https://a.example, http://b:5000/hub ; quay.io=https://c",
            "CASEMATE_PLAIN_HTTP_REGISTRIES": "r.lan:5000, other",
            "DOCKER_CONFIG": "/etc/docker-client",
            "CASEMATE_MAX_IMAGE_BYTES": "1000",
        }
    )
    assert settings.default_registry == ""
    assert settings.registry_mirrors == {
        "docker.io": ("https://a.example", "http://b:5000/hub"),
        "quay.io": ("https://c",),
    }
    assert settings.plain_http_registries == ("r.lan:5000", "other")
    assert settings.docker_config == Path("/etc/docker-client")
    assert settings.max_image_bytes == 1000


def test_from_environment_when_nothing_is_said_then_docker_hub_and_the_users_own_configuration() -> None:
    settings = Settings.from_environment({})
    assert (settings.default_registry, settings.registry_mirrors) == ("docker.io", {})
    assert settings.docker_config == Path("~/.docker")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CASEMATE_REGISTRY_MIRRORS", "docker.io"),
        ("CASEMATE_REGISTRY_MIRRORS", "docker.io="),
        ("CASEMATE_REGISTRY_MIRRORS", "docker.io=mirror.example"),
        ("CASEMATE_REGISTRY_MIRRORS", "docker.io=https://user:secret@mirror.example"),
        ("CASEMATE_PLAIN_HTTP_REGISTRIES", "http://r.lan"),
        ("CASEMATE_MAX_IMAGE_BYTES", "1G"),
        ("CASEMATE_MAX_IMAGE_BYTES", "0"),
        ("CASEMATE_MAX_IMAGE_BYTES", "9" * 5000),
    ],
)
def test_from_environment_when_a_registry_setting_is_wrong_then_the_variable_is_named(
    name: str, value: str
) -> None:
    with pytest.raises(InvalidConfigError, match="is expected") as caught:
        Settings.from_environment({name: value})
    assert caught.value.path == name


def test_settings_when_from_a_document_then_each_field_is_as_its_variable_would_be() -> None:
    document: dict[str, Any] = {
        "vsock": "user",
        "registry_mirrors": {
            "a.example": ["https://m.example", "https://n.example"],
            "b.example": ["https://o.example"],
        },
        "plain_http_registries": ["c.example:5000", "d.example"],
        "max_image_bytes": 1 << 30,
        "default_registry": "a.example",
        "docker_config": "/etc/docker",
    }

    settings = Settings.from_document(document)

    assert {name: getattr(settings, name) for name in document} == {
        **document,
        "registry_mirrors": {name: tuple(bases) for name, bases in document["registry_mirrors"].items()},
        "plain_http_registries": ("c.example:5000", "d.example"),
        "docker_config": Path("/etc/docker"),
    }
