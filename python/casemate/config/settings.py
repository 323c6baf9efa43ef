"""Where things lie on this host, and how patient to be. The only place that reads environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from casemate.errors import InvalidConfigError

__all__ = ["Settings"]

_BASE = re.compile(r"https?://[^/@\s?#]+(/[^@\s?#]*)?")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Host-wide settings; each has an environment variable.

    Args:
        state_root: Directory of the sandboxes' state (``CASEMATE_STATE_ROOT``, ``/run/casemate``).
        cache_root: Directory of kernels, initrds and unpacked images (``CASEMATE_CACHE``,
            ``/var/cache/casemate`` for root, else ``~/.cache/casemate``).
        qemu: Path or name of QEMU's binary (``CASEMATE_QEMU``).
        vsock: Who carries the connection to the guest: ``kernel`` (vhost-vsock), ``user`` (this process), or ``auto``: the
            kernel where it can (``CASEMATE_VSOCK``).
        timeout_factor: Every deadline is multiplied by it; for slow machines (``CASEMATE_TIMEOUT_FACTOR``).
        log_bytes: Bytes of one log file of a container of a detached sandbox; there are at most two a container
            (``CASEMATE_LOG_BYTES``, from 64 KiB on).
        failpoints: Steps that shall fail, for tests (``CASEMATE_FAILPOINTS``, see ``casemate.observe.failpoints``).
        default_registry: Host that a short name such as ``debian`` is pulled from (``CASEMATE_DEFAULT_REGISTRY``, ``docker.io``);
            empty: short names are refused.
        registry_mirrors: Base addresses to try first, in order, by registry host
            (``CASEMATE_REGISTRY_MIRRORS``: ``docker.io=https://a.example,https://b.example;quay.io=…``).
        plain_http_registries: Registries, ``host`` or ``host:port``, that are spoken to without TLS
            (``CASEMATE_PLAIN_HTTP_REGISTRIES``, commas between); loopback addresses always are.
        max_image_bytes: Most bytes that an image may unpack to, holes counted (``CASEMATE_MAX_IMAGE_BYTES``, 64 GiB).
        docker_config: Directory of ``config.json`` with the credentials (``DOCKER_CONFIG``, ``~/.docker``).
    """

    state_root: Path = Path("/run/casemate")
    cache_root: Path = Path("/var/cache/casemate")
    qemu: str = "qemu-system-x86_64"
    vsock: str = "auto"
    timeout_factor: float = 1.0
    log_bytes: int = 8 << 20
    failpoints: str = ""
    default_registry: str = "docker.io"
    registry_mirrors: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    plain_http_registries: tuple[str, ...] = ()
    max_image_bytes: int = 64 << 30
    docker_config: Path = Path("~/.docker")

    @classmethod
    def from_environment(cls, environment: dict[str, str] | None = None) -> Settings:
        """Settings from ``environment`` (default: this process's). Does not block.

        Raises:
            InvalidConfigError: A variable can't be used; ``path`` names it.
        """
        env = dict(os.environ) if environment is None else environment
        default_cache = (
            Path("/var/cache/casemate") if os.geteuid() == 0 else Path.home() / ".cache" / "casemate"
        )
        return cls(
            state_root=_absolute(env, "CASEMATE_STATE_ROOT", Path("/run/casemate")),
            cache_root=_absolute(env, "CASEMATE_CACHE", default_cache),
            qemu=env.get("CASEMATE_QEMU") or "qemu-system-x86_64",
            vsock=_choice(env, "CASEMATE_VSOCK", ("auto", "kernel", "user")),
            timeout_factor=_factor(env.get("CASEMATE_TIMEOUT_FACTOR", "1")),
            log_bytes=_log_bytes(env.get("CASEMATE_LOG_BYTES") or str(8 << 20)),
            failpoints=env.get("CASEMATE_FAILPOINTS", ""),
            default_registry=env.get("CASEMATE_DEFAULT_REGISTRY", "docker.io"),
            registry_mirrors=_mirrors(env.get("CASEMATE_REGISTRY_MIRRORS", "")),
            plain_http_registries=_hosts(env.get("CASEMATE_PLAIN_HTTP_REGISTRIES", "")),
            max_image_bytes=_bytes(env.get("CASEMATE_MAX_IMAGE_BYTES") or str(64 << 30)),
            docker_config=Path(env.get("DOCKER_CONFIG") or "~/.docker"),
        )

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Settings:
        """From a decoded TOML or JSON table; what it leaves out is as in an empty environment. Does not block.

        Raises:
            InvalidConfigError: An unknown field, a wrong type or a value that can't be used; ``path`` names it.
        """
        from casemate.config._checks import convert_document

        given = convert_document(document, _SettingsDocument)
        fields = {name: getattr(given, name) for name in _VARIABLES if getattr(given, name) is not None}
        try:
            return cls.from_environment(
                {_VARIABLES[name]: _variable_text(value) for name, value in fields.items()}
            )
        except InvalidConfigError as error:
            field = next((name for name, variable in _VARIABLES.items() if variable == error.path), "")
            raise InvalidConfigError(str(error).replace(error.path, field), path=field) from error


class _SettingsDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings as a file has them."""

    state_root: str | None = None
    cache_root: str | None = None
    qemu: str | None = None
    vsock: str | None = None
    timeout_factor: float | None = None
    log_bytes: int | None = None
    failpoints: str | None = None
    default_registry: str | None = None
    registry_mirrors: dict[str, tuple[str, ...]] | None = None
    plain_http_registries: tuple[str, ...] | None = None
    max_image_bytes: int | None = None
    docker_config: str | None = None


_VARIABLES = {
    "state_root": "CASEMATE_STATE_ROOT",
    "cache_root": "CASEMATE_CACHE",
    "qemu": "CASEMATE_QEMU",
    "vsock": "CASEMATE_VSOCK",
    "timeout_factor": "CASEMATE_TIMEOUT_FACTOR",
    "log_bytes": "CASEMATE_LOG_BYTES",
    "failpoints": "CASEMATE_FAILPOINTS",
    "default_registry": "CASEMATE_DEFAULT_REGISTRY",
    "registry_mirrors": "CASEMATE_REGISTRY_MIRRORS",
    "plain_http_registries": "CASEMATE_PLAIN_HTTP_REGISTRIES",
    "max_image_bytes": "CASEMATE_MAX_IMAGE_BYTES",
    "docker_config": "DOCKER_CONFIG",
}


def _variable_text(value: object) -> str:
    """A document's value as its environment variable has it, so that both are checked in one place."""
    if isinstance(value, dict):
        return ";".join(f"{key}={_variable_text(one)}" for key, one in value.items())
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _absolute(env: dict[str, str], name: str, default: Path) -> Path:
    path = Path(env[name]) if env.get(name) else default
    if not path.is_absolute():
        raise InvalidConfigError(f"{name} is {str(path)!r}, an absolute path is expected", path=name)
    return path


def _choice(env: dict[str, str], name: str, choices: tuple[str, ...]) -> str:
    chosen = env.get(name) or choices[0]
    if chosen not in choices:
        raise InvalidConfigError(f"{name} is {chosen!r}, one of {', '.join(choices)} is expected", path=name)
    return chosen


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0.1 <= factor <= 1000:
        raise InvalidConfigError(
            f"CASEMATE_TIMEOUT_FACTOR is {text!r}, a number from 0.1 to 1000 is expected",
            path="CASEMATE_TIMEOUT_FACTOR",
        )
    return factor


def _log_bytes(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 << 16 <= int(text) <= 1 << 40:
        return int(text)
    raise InvalidConfigError(
        f"CASEMATE_LOG_BYTES is {text!r}, a number of bytes from 65536 on is expected",
        path="CASEMATE_LOG_BYTES",
    )


def _bytes(text: str) -> int:
    # Longer numbers are no sizes, and Python refuses to read very long ones.
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise InvalidConfigError(
            f"CASEMATE_MAX_IMAGE_BYTES is {text!r}, a whole number of bytes is expected",
            path="CASEMATE_MAX_IMAGE_BYTES",
        )
    return int(text)


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(word.strip() for word in text.split(",") if word.strip())
    for host in hosts:
        if "/" in host:
            raise InvalidConfigError(
                f"CASEMATE_PLAIN_HTTP_REGISTRIES has {host!r}, host or host:port is expected",
                path="CASEMATE_PLAIN_HTTP_REGISTRIES",
            )
    return hosts


def _mirrors(text: str) -> dict[str, tuple[str, ...]]:
    mirrors = {}
    for entry in filter(None, (word.strip() for word in text.split(";"))):
        host, equals, addresses = entry.partition("=")
        bases = tuple(word.strip() for word in addresses.split(",") if word.strip())
        if not host or not equals or not bases or not all(_BASE.fullmatch(base) for base in bases):
            raise InvalidConfigError(
                f"CASEMATE_REGISTRY_MIRRORS has {entry!r}, HOST=https://MIRROR[,https://MIRROR…] is expected",
                path="CASEMATE_REGISTRY_MIRRORS",
            )
        mirrors[host.strip()] = bases
    return mirrors
