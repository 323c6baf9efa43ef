"""Users: names and numbers against the image's own files."""

from __future__ import annotations

import pytest

from casemate.errors import InvalidConfigError
from casemate.images.user import ResolvedUser, resolve_user

PASSWD = """root:x:0:0:root:/root:/bin/bash
# app:x:7:7::/wrong:
app:x:1000:1001:The app:/srv/app:/bin/sh
1000:x:55:56::/odd:
broken:x:abc:0::/:
short:x:1
"""
GROUP = """root:x:0:
app:x:1001:app
audio:x:29:other,app
video:x:44:app,other
video2:x:44:app
"""


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", ResolvedUser(uid=0, gid=0, home="/root")),
        ("root", ResolvedUser(uid=0, gid=0, home="/root")),
        ("0", ResolvedUser(uid=0, gid=0, home="/root")),
        ("app", ResolvedUser(uid=1000, gid=1001, additional_gids=(29, 44), home="/srv/app")),
        ("app:video", ResolvedUser(uid=1000, gid=44, home="/srv/app")),
        ("app:77", ResolvedUser(uid=1000, gid=77, home="/srv/app")),
        ("1000", ResolvedUser(uid=55, gid=56, home="/odd")),
        ("4242", ResolvedUser(uid=4242, gid=0, home="/")),
        ("4242:4343", ResolvedUser(uid=4242, gid=4343, home="/")),
        (":29", ResolvedUser(uid=0, gid=29, home="/root")),
    ],
)
def test_resolve_user_when_known_then_numbers(user: str, expected: ResolvedUser) -> None:
    assert resolve_user(user, passwd=PASSWD, group=GROUP) == expected


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("nobody", "no user 'nobody'; it knows root, app"),
        ("short", "no user 'short'"),
        ("app:nogroup", "no group 'nogroup'; it knows root, app"),
        ("app:", "a group is expected"),
        ("broken", "damaged"),
        ("-1", "no user '-1'"),
        ("4294967295", "from 0 to 2147483647"),
        ("0:99999999999", "from 0 to 2147483647"),
        ("١", "no user"),
    ],
)
def test_resolve_user_when_unknown_then_error_names_it(user: str, words: str) -> None:
    with pytest.raises(InvalidConfigError, match=words) as caught:
        resolve_user(user, passwd=PASSWD, group=GROUP)
    assert caught.value.path == "user"


def test_resolve_user_when_image_has_no_files_then_numbers_only() -> None:
    assert resolve_user("5:6", passwd="", group="") == ResolvedUser(uid=5, gid=6)
    with pytest.raises(InvalidConfigError, match="it has no /etc/passwd"):
        resolve_user("app", passwd="", group="")
