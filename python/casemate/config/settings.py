"""Where things lie on this host, and how patient to be. The only place that reads environment variables."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from casemate.errors import InvalidConfigError

__all__ = ["Settings"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Host-wide settings; each has an environment variable.

    Args:
        state_root: Directory of the sandboxes' state (``CASEMATE_STATE_ROOT``, ``/run/casemate``).
        cache_root: Directory of kernels, initrds and unpacked images (``CASEMATE_CACHE``,
            ``/var/cache/casemate`` for root, else ``~/.cache/casemate``).
        qemu: Path or name of QEMU's binary (``CASEMATE_QEMU``).
        timeout_factor: Every deadline is multiplied by it; for slow machines (``CASEMATE_TIMEOUT_FACTOR``).
        log_bytes: Bytes of one log file of a container of a detached sandbox; there are at most two a container
            (``CASEMATE_LOG_BYTES``, from 64 KiB on).
        failpoints: Steps that shall fail, for tests (``CASEMATE_FAILPOINTS``, see ``casemate.observe.failpoints``).
    """

    state_root: Path = Path("/run/casemate")
    cache_root: Path = Path("/var/cache/casemate")
    qemu: str = "qemu-system-x86_64"
    timeout_factor: float = 1.0
    log_bytes: int = 8 << 20
    failpoints: str = ""

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
            timeout_factor=_factor(env.get("CASEMATE_TIMEOUT_FACTOR", "1")),
            log_bytes=_log_bytes(env.get("CASEMATE_LOG_BYTES") or str(8 << 20)),
            failpoints=env.get("CASEMATE_FAILPOINTS", ""),
        )


def _absolute(env: dict[str, str], name: str, default: Path) -> Path:
    path = Path(env[name]) if env.get(name) else default
    if not path.is_absolute():
        raise InvalidConfigError(f"{name} is {str(path)!r}, an absolute path is expected", path=name)
    return path


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
