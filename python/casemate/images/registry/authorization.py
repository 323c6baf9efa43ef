"""How a registry wants to be asked: its challenges, and the tokens that answer them."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlencode, urlsplit

import msgspec

from casemate.errors import RegistryError
from casemate.images.registry.credentials import Credential
from casemate.images.registry.transport import Answer, Transport

__all__ = ["Authorizer", "Challenge", "parse_challenges"]

_MAX_TOKEN_BYTES = 1 << 20
_MAX_CHALLENGE = 8192
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))')
_SCHEME = re.compile(rf"({_TOKEN})(?=\s+|\s*$|\s*,)")


class Challenge(msgspec.Struct, frozen=True):
    """One ``WWW-Authenticate``: its scheme in lower case, and its parameters."""

    scheme: str
    parameters: dict[str, str]


class _TokenAnswer(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""


class Authorizer:
    """The authorisation for one repository at one address.

    Args:
        find: Gives the credential, or None. Asked only when the registry wants one: a helper may ask a person.
    """

    __slots__ = ("_asked", "_credential", "_find", "_repository", "_transport", "value")

    def __init__(self, transport: Transport, repository: str, find: Callable[[], Credential | None]) -> None:
        self._transport = transport
        self._repository = repository
        self._find = find
        self._asked = False
        self._credential: Credential | None = None
        self.value: str | None = None
        """The header to send; None before the first challenge."""

    def answer(self, refused: Answer) -> bool:
        """Set ``value`` after a 401; False when there is nothing else to try.

        Raises:
            RegistryError: The token can't be had.
        Blocks: for the credential helper and the token.
        """
        challenges = parse_challenges(refused.headers("WWW-Authenticate"))
        before = self.value
        for challenge in challenges:
            if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
                self.value = self._token(challenge.parameters, refused)
                return self.value != before
        if any(challenge.scheme == "basic" for challenge in challenges):
            credential = self._known()
            if credential is not None and credential.user:
                self.value = credential.basic()
                return self.value != before
        return False

    def has_credential(self) -> bool:
        """Whether a credential was found, for the text of an error."""
        return self._credential is not None

    def _known(self) -> Credential | None:
        if not self._asked:
            self._credential = self._find()
            self._asked = True
        return self._credential

    def _token(self, parameters: dict[str, str], refused: Answer) -> str:
        realm = parameters["realm"]
        # The credential goes where the registry says: never from a registry with TLS to a place without.
        if urlsplit(realm).scheme != "https" and urlsplit(refused.url).scheme == "https":
            raise RegistryError(
                f"registry {refused.registry} names an authorisation server without TLS: {realm!r}",
                registry=refused.registry,
                status=401,
            )
        service = parameters.get("service", "")
        scope = parameters.get("scope") or f"repository:{self._repository}:pull"
        credential = self._known()
        if credential is not None and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credential.identity_token,
                "service": service,
                "scope": scope,
                "client_id": "casemate",
            }
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = self._transport.open(
                realm, headers=headers, method="POST", body=urlencode(form).encode()
            )
        else:
            query = urlencode({"service": service, "scope": scope} if service else {"scope": scope})
            url = realm + ("&" if urlsplit(realm).query else "?") + query
            basic = credential.basic() if credential is not None and credential.user else None
            answer = self._transport.open(url, headers={"Accept": "application/json"}, authorization=basic)
        with answer:
            if answer.status != 200:
                raise RegistryError(
                    f"authorisation server {answer.registry} of registry {refused.registry} answers with status "
                    f"{answer.status}: "
                    + ("the credential is refused" if credential else "a credential is needed"),
                    registry=refused.registry,
                    status=answer.status if answer.status in (401, 403) else 401,
                )
            body = answer.read_whole(_MAX_TOKEN_BYTES)
        try:
            decoded = msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            decoded = _TokenAnswer()
        token = decoded.token or decoded.access_token
        if not token or not token.isascii() or not token.isprintable():
            # From nothing: the decoder's words could carry a part of a token.
            raise RegistryError(
                f"authorisation server {answer.registry} of registry {refused.registry} gave no token",
                registry=refused.registry,
                status=401,
            )
        return f"Bearer {token}"


def parse_challenges(values: list[str]) -> tuple[Challenge, ...]:
    """The challenges of all ``WWW-Authenticate`` headers, in order; what can't be read is left out. Does not block."""
    found: list[Challenge] = []
    for value in values:
        if len(value) > _MAX_CHALLENGE:
            continue
        position = 0
        while position < len(value):
            parameter = _PARAMETER.match(value, position)
            if parameter is not None and found:
                quoted = parameter[2]
                text = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else parameter[3]
                found[-1].parameters.setdefault(parameter[1].lower(), text)
                position = parameter.end()
            elif (scheme := _SCHEME.match(value, position)) is not None:
                found.append(Challenge(scheme[1].lower(), {}))
                position = scheme.end()
            else:
                position += 1
    return tuple(found)
