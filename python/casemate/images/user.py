"""From a user as images and callers write it to numbers. Pure: works on the text of passwd and group."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from casemate.errors import InvalidConfigError

__all__ = ["ResolvedUser", "resolve_user"]

_MAX_ID = 2**31 - 1


class ResolvedUser(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers for the process, and the home directory for its environment."""

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    home: str = "/"


def resolve_user(user: str, *, passwd: str, group: str) -> ResolvedUser:
    """Resolve ``name``, ``uid``, ``name:group``, ``uid:gid`` or a mixture; empty is ``0``. Does not block.

    A number need not be in passwd: its group is 0 then and its home ``/``. Without a group the additional groups
    are those in which group lists the user's name; with one there are none.

    Raises:
        InvalidConfigError: A name is not in the image, a number is out of range (``path`` is ``user``).
    """
    name, colon, group_name = user.partition(":")
    if colon and not group_name:
        raise InvalidConfigError(f"user is {user!r}, a group is expected after the colon", path="user")
    name = name or "0"
    entry = _find(passwd, name, fields=7)
    if entry is not None:
        uid, gid = _number(entry[2]), _number(entry[3])
        home = entry[5] or "/"
        login = entry[0]
    else:
        uid, gid, home, login = _number(name), 0, "/", ""
        if uid is None:
            raise _unknown("user", name, passwd, user)
    if uid is None or gid is None:
        raise InvalidConfigError(
            f"user is {user!r}, its entry in the image's /etc/passwd is damaged", path="user"
        )
    if colon:
        found = _find(group, group_name, fields=4)
        explicit = _number(found[2] if found is not None else group_name)
        if explicit is None:
            raise _unknown("group", group_name, group, user)
        return ResolvedUser(uid=uid, gid=explicit, home=home)
    additional = (
        number
        for entry in _entries(group, fields=4)
        if login
        and login in entry[3].split(",")
        and (number := _number(entry[2])) is not None
        and number != gid
    )
    return ResolvedUser(uid=uid, gid=gid, additional_gids=tuple(dict.fromkeys(additional)), home=home)


def _entries(text: str, *, fields: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        parts = line.strip().split(":")
        if len(parts) >= fields and parts[0] and not parts[0].startswith("#"):
            yield parts


def _find(text: str, wanted: str, *, fields: int) -> list[str] | None:
    """The entry with that name, else the first with that number."""
    by_number = None
    for entry in _entries(text, fields=fields):
        if entry[0] == wanted:
            return entry
        if by_number is None and entry[2] == wanted:
            by_number = entry
    return by_number


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    number = int(text)
    return number if number <= _MAX_ID else None


def _unknown(kind: str, name: str, text: str, user: str) -> InvalidConfigError:
    if name.isascii() and name.isdigit():
        return InvalidConfigError(f"user is {user!r}, a {kind} from 0 to {_MAX_ID} is expected", path="user")
    known = [entry[0] for entry in _entries(text, fields=3)][:20]
    there = (
        f"it knows {', '.join(known)}"
        if known
        else f"it has no /etc/{'passwd' if kind == 'user' else 'group'}"
    )
    return InvalidConfigError(f"user is {user!r}, the image has no {kind} {name!r}; {there}", path="user")
