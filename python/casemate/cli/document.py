"""Documents in TOML and JSON: read with bounds, written with what is not set as a comment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from casemate.errors import HostError, InvalidConfigError, NotFoundError

__all__ = ["read_document", "to_toml"]

_MAX_BYTES = 1 << 20


def read_document(path: Path) -> dict[str, Any]:
    """The table in the file ``path``: JSON when it ends in ``.json`` or begins with a brace, else TOML.

    Raises:
        NotFoundError: There is no such file.
        HostError: It can't be read.
        InvalidConfigError: It is larger than 1 MiB, no text, or neither TOML nor JSON; the text says where it goes wrong.
    Blocks: for a file read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise HostError(
            f"{path} can't be read: {error.strerror}", errno=error.errno or 0, target=str(path)
        ) from error
    if len(data) > _MAX_BYTES:
        raise InvalidConfigError(f"{path} is larger than 1 MiB, a configuration document is expected")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidConfigError(
            f"{path} is no text in UTF-8: {error.reason} at byte {error.start}"
        ) from error
    if path.suffix == ".json" or text.lstrip().startswith("{"):
        return _from_json(path, text)
    return _from_toml(path, text)


def _from_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidConfigError(f"{path} holds no JSON object, one with the document's fields is expected")
    return value


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _from_toml(path: Path, text: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidConfigError(f"{path} is no TOML: {error}") from error


def to_toml(document: object) -> str:
    """``document`` (a struct or a mapping) as TOML. What is None stands as a comment, for TOML has no word for it."""
    return "\n".join(_table(_fields(document), ())) + "\n"


def _table(fields: Mapping[str, Any], at: tuple[str, ...]) -> list[str]:
    lines = []
    tables = []
    for name, value in fields.items():
        if isinstance(value, (msgspec.Struct, Mapping)):
            tables.append((name, _fields(value)))
        elif value is None:
            lines.append(f"# {_key(name)} is not set")
        else:
            lines.append(f"{_key(name)} = {_value(value)}")
    for name, inner in tables:
        path = (*at, name)
        lines += ["", f"[{'.'.join(map(_key, path))}]", *_table(inner, path)]
    return lines


def _fields(document: object) -> Mapping[str, Any]:
    if isinstance(document, msgspec.Struct):
        return {name: getattr(document, name) for name in document.__struct_fields__}
    assert isinstance(document, Mapping)
    return document


def _key(name: str) -> str:
    plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if plain else _text(name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(one) for one in value)}]"
    if isinstance(value, (msgspec.Struct, Mapping)):
        pairs = [f"{_key(name)} = {_value(one)}" for name, one in _fields(value).items() if one is not None]
        return f"{{{', '.join(pairs)}}}"
    return _text(str(value))


def _text(text: str) -> str:
    # TOML's basic strings escape as JSON's do, but DEL has to be escaped as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
