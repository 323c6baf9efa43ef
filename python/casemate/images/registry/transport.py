"""One HTTP request to a registry: TLS checked, deadlines kept, redirects followed without taking credentials along."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal
from urllib.parse import urljoin, urlsplit

from casemate.errors import RegistryError
from casemate.images.registry.name import is_loopback

__all__ = ["Answer", "Transport", "origin_of"]

_CONNECT_S = 15.0
_ANSWER_S = 60.0
_PACE_S = 30.0
"""A body must bring ``_PACE_BYTES`` more in this time."""
_PACE_BYTES = 64 << 10
_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 16 << 10
_REDIRECTS = (301, 302, 303, 307, 308)


class _Deadline:
    """A moment that can be moved."""

    __slots__ = ("_at",)

    def __init__(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    def move(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        left_s = self._at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        return left_s


class _Raw(io.RawIOBase):
    """What comes from a socket, each wait cut by the deadline of the whole request."""

    def __init__(self, raw: socket.SocketIO, sock: socket.socket, deadline: _Deadline) -> None:
        self._raw = raw
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int | None:
        self._sock.settimeout(self._deadline.left_s())
        return self._raw.readinto(buffer)  # type: ignore[arg-type]

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Socket:
    """As much of a socket as ``http.client`` uses. Its own timeouts bound one read, and a peer that sends a byte at a time has many."""

    __slots__ = ("_deadline", "_sock")

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.left_s())
        self._sock.sendall(data)

    def makefile(self, mode: Literal["rb"]) -> io.BufferedReader:
        raw = self._sock.makefile(mode, buffering=0)
        return io.BufferedReader(_Raw(raw, self._sock, self._deadline), 256 << 10)

    def close(self) -> None:
        self._sock.close()


class Answer:
    """An answer whose body is still to be read. A context manager; closing it ends the connection."""

    __slots__ = ("_connection", "_deadline", "_owed_bytes", "_pace_s", "_response", "registry", "url")

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        deadline: _Deadline,
        pace_s: float,
        url: str,
    ) -> None:
        self._connection = connection
        self._response = response
        self._deadline = deadline
        self._pace_s = pace_s
        self._owed_bytes = _PACE_BYTES
        self.url = url
        self.registry = urlsplit(url).netloc

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def status(self) -> int:
        """Status of HTTP."""
        return self._response.status

    def header(self, name: str) -> str:
        """A header, empty when absent."""
        return self._response.headers.get(name, "")

    def headers(self, name: str) -> list[str]:
        """All headers of that name."""
        return self._response.headers.get_all(name, [])

    def read_some(self, max_bytes: int) -> bytes:
        """The next bytes of the body, empty at its end.

        Raises:
            RegistryError: The connection broke, or brings less than 64 KiB in 30 s.
        """
        if self._owed_bytes <= 0:
            self._deadline.move(self._pace_s)
            self._owed_bytes = _PACE_BYTES
        try:
            data = self._response.read1(max_bytes)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise _broken(self.registry, exc) from exc
        self._owed_bytes -= len(data)
        return data

    def read_whole(self, max_bytes: int) -> bytes:
        """The whole body, which must not be longer than ``max_bytes``.

        Raises:
            RegistryError: It is, or the connection broke.
        """
        body = bytearray()
        while data := self.read_some(max_bytes + 1 - len(body)):
            body += data
            if len(body) > max_bytes:
                raise RegistryError(
                    f"registry {self.registry} answers with more than {max_bytes} bytes where a document is expected",
                    registry=self.registry,
                    status=self.status,
                )
        length = self._response.headers.get("Content-Length")
        if length is not None and length.isdigit() and int(length) != len(body):
            raise _broken(self.registry, EOFError(f"{len(body)} of {length} bytes came"))
        return bytes(body)

    def read_error(self) -> bytes:
        """The beginning of the body of an error, whatever comes of it."""
        try:
            return self.read_some(_MAX_ERROR_BYTES)
        except RegistryError:
            return b""

    def close(self) -> None:
        """End the connection."""
        self._response.close()
        self._connection.close()


class Transport:
    """Makes requests.

    Args:
        is_plain: Whether a ``host`` or ``host:port`` may be spoken to without TLS though it is not loopback.
    """

    __slots__ = ("_context", "_factor", "_is_plain")

    def __init__(self, *, is_plain: Callable[[str], bool], timeout_factor: float = 1.0) -> None:
        self._is_plain = is_plain
        self._factor = timeout_factor
        self._context: ssl.SSLContext | None = None

    def may_be_plain(self, host: str) -> bool:
        """Whether ``host`` may be spoken to without TLS."""
        return is_loopback(host) or self._is_plain(host)

    def open(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        authorization: str | None = None,
        method: str = "GET",
        body: bytes | None = None,
    ) -> Answer:
        """The answer to a request, redirects followed; ``authorization`` goes to the origin of ``url`` and to no other.

        Raises:
            RegistryError: The host can't be reached, or the request would go out without TLS where that was not asked for.
        Blocks: for the answer's head, 60 s times the factor at most for each redirect.
        """
        origin = origin_of(url)
        for _ in range(_MAX_REDIRECTS + 1):
            sent = dict(headers)
            if authorization is not None and origin_of(url) == origin:
                sent["Authorization"] = authorization
            answer = self._open_one(method, url, sent, body)
            location = answer.header("Location")
            if answer.status not in _REDIRECTS or not location or method != "GET":
                return answer
            answer.close()
            try:
                target = urljoin(url, location)
                origin_of(target)
            except ValueError as exc:
                raise RegistryError(
                    f"registry {answer.registry} redirects to {location!r}, which is no address",
                    registry=answer.registry,
                    status=answer.status,
                ) from exc
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
                raise RegistryError(
                    f"registry {answer.registry} redirects from https to {urlsplit(target).scheme or 'nowhere'}",
                    registry=answer.registry,
                    status=answer.status,
                )
            url = target
        raise RegistryError(
            f"registry {urlsplit(url).netloc} redirects more than {_MAX_REDIRECTS} times",
            registry=urlsplit(url).netloc,
        )

    def _open_one(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        host, connection = self._connection(url)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.connect()
            deadline = _Deadline(_ANSWER_S * self._factor)
            connection.sock = _Socket(connection.sock, deadline)
            # A coding would make lengths, ranges and digests those of something else.
            connection.request(
                method,
                target,
                body=body,
                headers={"Accept-Encoding": "identity", "Connection": "close", **headers},
            )
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as exc:
            connection.close()
            raise _broken(host, exc) from exc
        except BaseException:
            connection.close()
            raise
        deadline.move(_PACE_S * self._factor)
        return Answer(connection, response, deadline, _PACE_S * self._factor, url)

    def _connection(self, url: str) -> tuple[str, http.client.HTTPConnection]:
        parts = urlsplit(url)
        host = parts.netloc
        try:
            name, port = parts.hostname, parts.port
        except ValueError as exc:
            raise RegistryError(f"{url!r} is no address: {exc}", registry=host) from exc
        if parts.scheme not in ("http", "https") or not name or "@" in host:
            raise RegistryError(f"{url!r} is no address of a registry", registry=host)
        timeout_s = _CONNECT_S * self._factor
        if parts.scheme == "https":
            if self._context is None:
                self._context = ssl.create_default_context()
            return host, http.client.HTTPSConnection(name, port, timeout=timeout_s, context=self._context)
        if not self.may_be_plain(host):
            raise RegistryError(
                f"registry {host} would be spoken to without TLS; to allow it, list it in CASEMATE_PLAIN_HTTP_REGISTRIES",
                registry=host,
            )
        return host, http.client.HTTPConnection(name, port, timeout=timeout_s)


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address: what credentials are bound to. Does not block. Raises: ValueError."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _broken(host: str, cause: BaseException) -> RegistryError:
    if isinstance(cause, ssl.SSLCertVerificationError):
        text = f"registry {host} has a certificate that can't be trusted: {cause.verify_message}"
    elif isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        text = f"registry {host} does not speak TLS; to go without, list it in CASEMATE_PLAIN_HTTP_REGISTRIES"
    elif isinstance(cause, http.client.IncompleteRead):
        text = f"registry {host} ended the connection before the end of its answer"
    else:
        text = f"registry {host} can't be reached or broke off: {str(cause) or type(cause).__name__}"
    return RegistryError(text, registry=host)
