"""Credentials of registries, from docker's ``config.json`` and the helper programs that it names."""

from __future__ import annotations

import base64
import binascii
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from pathlib import Path

import msgspec

from casemate.errors import HostError, InvalidConfigError
from casemate.images.registry.name import DOCKER_HUB

__all__ = ["Credential", "find_credential"]

_MAX_CONFIG_BYTES = 4 << 20
_MAX_ANSWER_BYTES = 64 << 10
_HELPER_S = 30.0
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_KEY = "https://index.docker.io/v1/"
# What helpers print for «I have none», by their protocol.
_ABSENT = b"credentials not found"
_TOKEN_USER = "<token>"


class Credential:
    """User and secret, or a token that the authorisation server made. Never shown: neither by ``repr`` nor in an error."""

    __slots__ = ("identity_token", "secret", "user")

    def __init__(self, *, user: str = "", secret: str = "", identity_token: str = "") -> None:
        self.user = user
        self.secret = secret
        self.identity_token = identity_token

    def __repr__(self) -> str:
        return "Credential(…)"

    def basic(self) -> str:
        """Value of a header for basic authorisation."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _Config(msgspec.Struct, frozen=True, rename="camel"):
    auths: dict[str, _Entry] = msgspec.field(default_factory=dict)
    cred_helpers: dict[str, str] = msgspec.field(default_factory=dict)
    creds_store: str = ""


class _HelperAnswer(msgspec.Struct, frozen=True, rename="pascal"):
    username: str
    secret: str


def find_credential(
    directory: Path, host: str, repository: str, *, timeout_factor: float = 1.0
) -> Credential | None:
    """The credential for an image, or None: from the helper of its host, else the helper for all, else the file itself.

    Args:
        directory: Of ``config.json``.
        host: ``docker.io``, ``quay.io``, ``127.0.0.1:5000``.
        repository: The file's own entries may be for a part of a registry: the longest that fits is taken.

    Raises:
        InvalidConfigError: The file can't be read as such.
        HostError: A helper is missing, failed, or gave no answer in 30 s.
    Blocks: for a small read and the helper.
    """
    path = directory.expanduser() / "config.json"
    config = _read(path)
    if config is None:
        return None
    server = _HUB_KEY if host == DOCKER_HUB else host
    for key in dict.fromkeys((server, host)):
        if helper := config.cred_helpers.get(key):
            return _ask_helper(helper, key, path, _HELPER_S * timeout_factor)
    if config.creds_store:
        found = _ask_helper(config.creds_store, server, path, _HELPER_S * timeout_factor)
        if found is not None:
            return found
    for key in _keys(host, repository):
        if (entry := config.auths.get(key)) is not None and (found := _from_entry(entry, key, path)):
            return found
    return None


def _read(path: Path) -> _Config | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise HostError(
            f"{path} can't be read: {exc.strerror}", errno=exc.errno or 0, target=str(path)
        ) from exc
    if len(data) > _MAX_CONFIG_BYTES:
        raise InvalidConfigError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes", path=str(path))
    try:
        return msgspec.json.decode(data, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        # The decoder's words tell places and types, never values.
        raise InvalidConfigError(f"{path} is no docker configuration: {exc}", path=str(path)) from exc


def _keys(host: str, repository: str) -> tuple[str, ...]:
    parts = repository.split("/")
    places = [f"{host}/{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1)]
    forms = (
        host,
        f"https://{host}",
        f"https://{host}/",
        f"https://{host}/v1/",
        f"https://{host}/v2/",
        f"http://{host}",
    )
    return (*places, *((_HUB_KEY, "index.docker.io") if host == DOCKER_HUB else ()), *forms)


def _from_entry(entry: _Entry, key: str, path: Path) -> Credential | None:
    user, secret = entry.username, entry.password
    if entry.auth:
        try:
            text = base64.b64decode(entry.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise InvalidConfigError(
                f"{path} has an entry for {key} whose auth is not base64 of USER:SECRET",
                path=f"auths.{key}.auth",
            ) from exc
        user, colon, secret = text.rstrip("\0").partition(":")
        if not colon:
            raise InvalidConfigError(
                f"{path} has an entry for {key} whose auth is not base64 of USER:SECRET",
                path=f"auths.{key}.auth",
            )
    if entry.identitytoken:
        return Credential(user=user, identity_token=entry.identitytoken)
    return Credential(user=user, secret=secret) if user else None


def _ask_helper(name: str, server: str, path: Path, timeout_s: float) -> Credential | None:
    if not _HELPER.fullmatch(name):
        raise InvalidConfigError(
            f"{path} names the credential helper {name!r}, a word such as pass is expected",
            path="credHelpers",
        )
    program = shutil.which(f"docker-credential-{name}")
    if program is None:
        raise HostError(
            f"docker-credential-{name}, which {path} names for {server}, is not on PATH",
            target=f"docker-credential-{name}",
        )
    status, answer = _run(program, server, timeout_s)
    if status != 0:
        if _ABSENT in answer.lower():
            return None
        # What it printed may be a secret, so it is not repeated.
        raise HostError(f"{program} get failed for {server} with status {status}", target=program)
    try:
        decoded = msgspec.json.decode(answer, type=_HelperAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise HostError(
            f"{program} gave no credential that can be read for {server}", target=program
        ) from exc
    if decoded.username == _TOKEN_USER:
        return Credential(identity_token=decoded.secret)
    return Credential(user=decoded.username, secret=decoded.secret)


def _run(program: str, server: str, timeout_s: float) -> tuple[int, bytes]:
    """Exit status and output of a helper, both bounded: it is somebody else's program."""
    deadline = time.monotonic() + timeout_s
    answer = bytearray()
    try:
        process = subprocess.Popen(
            [program, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as exc:
        raise HostError(
            f"{program} can't be started: {exc.strerror}", errno=exc.errno or 0, target=program
        ) from exc
    with process, selectors.DefaultSelector() as selector:
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("both were asked for")
        try:
            try:
                # Less than a pipe holds, so it never waits.
                stdin.write(f"{server}\n".encode())
                stdin.close()
            except BrokenPipeError:
                pass  # It has ended, or does not care; its status tells.
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise HostError(
                        f"{program} get gave no answer for {server} in {timeout_s:g} s", target=program
                    )
                data = os.read(stdout.fileno(), _MAX_ANSWER_BYTES)
                answer += data
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise HostError(
                        f"{program} get printed more than {_MAX_ANSWER_BYTES} bytes", target=program
                    )
                if not data:
                    break
            return process.wait(max(deadline - time.monotonic(), 0.01)), bytes(answer)
        except subprocess.TimeoutExpired as exc:
            raise HostError(f"{program} get did not end in {timeout_s:g} s", target=program) from exc
        finally:
            if process.poll() is None:
                # With what it started itself: that may hold our pipe.
                os.killpg(process.pid, signal.SIGKILL)
