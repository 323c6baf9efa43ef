"""Checks that the configuration documents share. Each names the field and the nearest right value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from casemate.errors import InvalidConfigError

__all__: list[str] = []

_Document = TypeVar("_Document", bound=msgspec.Struct)

# The containers' world takes any length; ours ends at 64 so that a socket below the default state root fits into the
# 107 bytes of a Unix socket's path.
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,63}")
_LABEL = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
_AT = re.compile(r"^(.*?)(?: - at `\$?(.*)`)?$", re.DOTALL)
_MISSING_FIELD = re.compile(r"^Object missing required field `(.*)`$")
_UNKNOWN_FIELD = re.compile(r"^Object contains unknown field `(.*)`$")


def check_name(path: str, value: str) -> None:
    """A sandbox's or container's name: 2 to 64 letters, digits, ``_``, ``.``, ``-``, first a letter or digit."""
    _check_text(path, value)
    if _NAME.fullmatch(value):
        return
    nearest = re.sub(r"[^a-zA-Z0-9_.-]", "-", value).lstrip("_.-")[:64].ljust(2, "0")
    raise InvalidConfigError(
        f"{path} is {value!r}, 2 to 64 letters, digits, '_', '.' or '-' starting with a letter or digit are"
        f" expected, as {nearest!r}",
        path=path,
    )


def check_hostname(path: str, value: str) -> None:
    """A host name: labels of letters, digits and inner ``-``, joined by dots, at most 253 characters."""
    _check_text(path, value)
    if len(value) > 253 or not all(_LABEL.fullmatch(label) for label in value.split(".")):
        raise InvalidConfigError(
            f"{path} is {value!r}, labels of up to 63 letters, digits and inner '-' joined by dots are expected",
            path=path,
        )


def check_integer(path: str, value: object, low: int, high: int, unit: str) -> None:
    """A whole number from ``low`` to ``high``, both included."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidConfigError(f"{path} is {value!r}, a whole number of {unit} is expected", path=path)
    if not low <= value <= high:
        nearest = low if value < low else high
        raise InvalidConfigError(
            f"{path} is {value}, {low} to {high} {unit} are possible; the nearest is {nearest}", path=path
        )


def check_seconds(path: str, value: object) -> None:
    """A time limit in seconds, above 0 and at most a day."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 86400:
        raise InvalidConfigError(
            f"{path} is {value!r}, seconds above 0 and up to 86400 are expected", path=path
        )


def check_choice(path: str, value: str, choices: Sequence[str]) -> None:
    """One of ``choices``."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise InvalidConfigError(
            f"{path} is {value!r}, {expected} are possible{_nearest(str(value), choices)}", path=path
        )


def check_file_path(path: str, value: str) -> None:
    """A path that can be handed to the system: not empty, no NUL."""
    _check_text(path, value)
    if not value:
        raise InvalidConfigError(
            f"{path} is empty, a path is expected (leave it out for the default)", path=path
        )


def check_absolute_path(path: str, value: str) -> None:
    """An absolute path."""
    check_file_path(path, value)
    if not value.startswith("/"):
        raise InvalidConfigError(
            f"{path} is {value!r}, an absolute path is expected, as {'/' + value!r}", path=path
        )


def check_words(path: str, value: Sequence[str] | bytes, *, empty_word: bool = True) -> tuple[str, ...]:
    """A sequence of words without NUL, as a tuple. A single string is refused: it is not split."""
    if isinstance(value, (str, bytes)):
        word = value if isinstance(value, str) else value.decode(errors="replace")
        raise InvalidConfigError(
            f"{path} is the single text {word!r}, a sequence of words is expected, as {word.split()!r}",
            path=path,
        )
    words = tuple(value)
    for index, word in enumerate(words):
        _check_text(f"{path}[{index}]", word)
        if not word and not empty_word:
            raise InvalidConfigError(f"{path}[{index}] is empty, leave it out", path=f"{path}[{index}]")
    return words


def check_pairs(path: str, value: object) -> None:
    """Names to texts, without NUL and with no ``=`` in a name."""
    if not isinstance(value, Mapping):
        raise InvalidConfigError(f"{path} is {value!r}, a mapping of names to texts is expected", path=path)
    for name, text in value.items():
        _check_text(path, name)
        if not name or "=" in name:
            raise InvalidConfigError(f"{path} has the name {name!r}, one without '=' is expected", path=path)
        _check_text(f"{path}.{name}", text)


def _check_text(path: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidConfigError(f"{path} is {value!r}, a text is expected", path=path)
    if "\0" in value:
        raise InvalidConfigError(
            f"{path} holds a NUL character, which no path, name or argument can", path=path
        )


def _nearest(value: str, choices: Sequence[str]) -> str:
    import difflib  # only when something is wrong: 3 ms

    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def convert_document(document: Mapping[str, Any], kind: type[_Document]) -> _Document:
    """``document`` (as TOML or JSON decodes it) as ``kind``.

    Raises:
        InvalidConfigError: Wrong type, unknown field, or a value without meaning; ``path`` says where.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        text, where = _split_location(str(error))
        cause = error.__cause__
        if isinstance(cause, InvalidConfigError):
            path = ".".join(part for part in (where, cause.path) if part)
            text = str(cause)
            if where:
                text = f"{where}: {text}"
            raise InvalidConfigError(text, path=path) from error
        unknown = _UNKNOWN_FIELD.match(text)
        if unknown:
            fields = _fields_at(kind, where)
            path = ".".join(part for part in (where, unknown[1]) if part)
            raise InvalidConfigError(
                f"{path} is no known field{_nearest(unknown[1], fields)}", path=path
            ) from error
        missing = _MISSING_FIELD.match(text)
        if missing:
            path = ".".join(part for part in (where, missing[1]) if part)
            raise InvalidConfigError(f"{path} is missing", path=path) from error
        raise InvalidConfigError(
            f"{where or 'document'}: {text[:1].lower()}{text[1:]}", path=where
        ) from error


def _split_location(text: str) -> tuple[str, str]:
    match = _AT.match(text)
    if match is None:
        return text, ""
    return match[1], (match[2] or "").lstrip(".")


def _fields_at(kind: type[msgspec.Struct], where: str) -> Sequence[str]:
    current: Any = kind
    for part in filter(None, where.split(".")):
        current = {field.name: field.type for field in msgspec.structs.fields(current)}.get(part)
        if not (isinstance(current, type) and issubclass(current, msgspec.Struct)):
            return ()
    return tuple(field.encode_name for field in msgspec.structs.fields(current))
