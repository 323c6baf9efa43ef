"""The part of the distribution API that a pull needs, over mirrors and the registry itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from casemate.config.settings import Settings
from casemate.errors import ImageError, InvalidConfigError, NotFoundError, RegistryError
from casemate.images import documents
from casemate.images.registry.authorization import Authorizer
from casemate.images.registry.credentials import find_credential
from casemate.images.registry.name import DOCKER_HUB, RegistryName
from casemate.images.registry.transport import Answer, Transport, origin_of
from casemate.observe.log import Log

__all__ = ["Document", "RegistryClient"]

_log = Log(__name__)

_HUB_API = "registry-1.docker.io"
_ACCEPTED = ", ".join((*documents.MANIFEST_MEDIA_TYPES, *documents.INDEX_MEDIA_TYPES))
_MAX_MANIFEST_BYTES = 4 << 20
_RANGE = re.compile(r"bytes (\d+)-\d*/(?:\d+|\*)")


class Document(msgspec.Struct, frozen=True):
    """A manifest or index, its digest that of its bytes."""

    data: bytes
    digest: str
    media_type: str


class _Error(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct, frozen=True):
    errors: tuple[_Error, ...] = ()


class _Endpoint:
    """One address that has the repository, with its own authorisation."""

    __slots__ = ("authorizer", "base")

    def __init__(self, base: str, authorizer: Authorizer) -> None:
        self.base = base
        self.authorizer = authorizer


class RegistryClient:
    """Reads one image's repository. Not for several threads at once.

    Args:
        name: The image.
        reference: As the caller named it, for errors.
    """

    __slots__ = ("_endpoints", "_name", "_reference", "_transport")

    def __init__(self, name: RegistryName, *, reference: str, settings: Settings) -> None:
        self._name = name
        self._reference = reference
        asked = {*settings.plain_http_registries}
        mirrors = settings.registry_mirrors.get(name.host, ())
        asked.update(urlsplit(base).netloc for base in mirrors if base.startswith("http://"))
        self._transport = Transport(
            is_plain=lambda host: host in asked, timeout_factor=settings.timeout_factor
        )
        host = _HUB_API if name.host == DOCKER_HUB else name.host
        scheme = "http" if self._transport.may_be_plain(name.host) else "https"
        self._endpoints = [
            *(self._endpoint(base, urlsplit(base).netloc, settings) for base in mirrors),
            self._endpoint(f"{scheme}://{host}", name.host, settings),
        ]

    def get_manifest(self, selector: str) -> Document:
        """The manifest or index of a tag or digest, checked against the digest.

        Raises:
            NotFoundError: There is none.
            RegistryError: The registry can't be reached, refuses, or answers with an error.
            ImageError: It is not what its digest says.
        Blocks: for the answer, 60 s times the factor at most for each request.
        """
        with self._open(
            f"manifests/{selector}", {"Accept": _ACCEPTED}, what=f"image {self._name.text}"
        ) as answer:
            data = answer.read_whole(_MAX_MANIFEST_BYTES)
            promised = answer.header("Docker-Content-Digest")
            media_type = answer.header("Content-Type").partition(";")[0].strip()
        digest = documents.digest_of(data)
        expected = selector if selector.startswith("sha256:") else promised
        if expected.startswith("sha256:") and expected != digest:
            raise ImageError(
                f"manifest of image {self._reference!r} is damaged: its digest is {digest}, {expected} is expected",
                reference=self._reference,
                digest=expected,
            )
        return Document(data, digest, media_type)

    def get_blob(self, digest: str, *, max_bytes: int) -> bytes:
        """A small blob, whole; its digest is for the caller to check. Raises and blocks as :meth:`get_manifest`."""
        with self._open(f"blobs/{digest}", {}, what=f"blob {digest} of image {self._name.text}") as answer:
            return answer.read_whole(max_bytes)

    def open_blob(self, digest: str, offset_bytes: int) -> tuple[Answer, int]:
        """A blob from ``offset_bytes`` on, and where its body really starts: at 0 when the registry can't do ranges.

        Raises as :meth:`get_manifest`. Blocks: for the answer's head.
        """
        headers = {"Range": f"bytes={offset_bytes}-"} if offset_bytes else {}
        answer = self._open(f"blobs/{digest}", headers, what=f"blob {digest} of image {self._name.text}")
        if answer.status == 200:
            return answer, 0
        place = _RANGE.fullmatch(answer.header("Content-Range").strip())
        if answer.status == 206 and place is not None and int(place[1]) == offset_bytes:
            return answer, offset_bytes
        answer.close()
        if not offset_bytes:
            raise RegistryError(
                f"registry {answer.registry} answers with status {answer.status} for blob {digest}",
                registry=answer.registry,
                status=answer.status,
            )
        return self.open_blob(digest, 0)

    def _endpoint(self, base: str, host: str, settings: Settings) -> _Endpoint:
        if not host or urlsplit(base).scheme not in ("http", "https") or "@" in host:
            raise InvalidConfigError(
                f"mirror of {self._name.host} is {base!r}, https://HOST is expected", path="registry_mirrors"
            )
        repository = self._name.repository
        authorizer = Authorizer(
            self._transport,
            repository,
            lambda: find_credential(
                settings.docker_config, host, repository, timeout_factor=settings.timeout_factor
            ),
        )
        return _Endpoint(base.rstrip("/"), authorizer)

    def _open(self, path: str, headers: Mapping[str, str], *, what: str) -> Answer:
        """The first good answer, from the mirrors in order and then the registry itself."""
        failures: list[Exception] = []
        for endpoint in tuple(self._endpoints):
            try:
                return self._ask(
                    endpoint, f"{endpoint.base}/v2/{self._name.repository}/{path}", headers, what
                )
            except (RegistryError, NotFoundError) as error:
                failures.append(error)
                if endpoint is not self._endpoints[-1]:
                    _log.info(
                        "a mirror does not help",
                        extra={"op": "registry.get", "target": endpoint.base, "reason": str(error)},
                    )
        last = failures.pop()
        for failure in failures:
            last.add_note(f"mirror: {failure}")
        raise last

    def _ask(self, endpoint: _Endpoint, url: str, headers: Mapping[str, str], what: str) -> Answer:
        # Twice refused: a token may have run out between two requests, a fresh one has not.
        for _ in range(3):
            answer = self._transport.open(url, headers=headers, authorization=endpoint.authorizer.value)
            if answer.status in (200, 206, 416):
                return answer
            with answer:
                # What a redirect led to gets no credential, and so no answer to a challenge either.
                ours = origin_of(answer.url) == origin_of(url)
                if answer.status != 401 or not ours or not endpoint.authorizer.answer(answer):
                    raise self._refusal(answer, endpoint.authorizer, what)
        raise RegistryError(
            f"registry {urlsplit(url).netloc} refuses {what} and the tokens it gives",
            registry=urlsplit(url).netloc,
            status=401,
        )

    def _refusal(self, answer: Answer, authorizer: Authorizer, what: str) -> Exception:
        said = _words(answer)
        if answer.status == 404:
            return NotFoundError(f"registry {answer.registry} has no {what}{said}")
        text = f"registry {answer.registry} refuses {what} with status {answer.status}{said}"
        if answer.status in (401, 403):
            text += (
                "; the credential of config.json is not enough"
                if authorizer.has_credential()
                else f"; log in with: docker login {self._name.host}"
            )
        return RegistryError(text, registry=answer.registry, status=answer.status)


def _words(answer: Answer) -> str:
    """What the registry says of an error, fit for a terminal."""
    try:
        errors = msgspec.json.decode(answer.read_error(), type=_Errors).errors
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    text = "; ".join(error.message or error.code for error in errors[:3])
    clean = "".join(character for character in text if character.isprintable())[:300]
    return f": {clean}" if clean else ""
