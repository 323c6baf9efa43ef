"""Names of images in registries: what each part may be, and what a short one means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.errors import InvalidConfigError
from casemate.images.registry.name import RegistryName, is_loopback, parse_name

DIGEST = f"sha256:{'ab' * 32}"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("docker://debian:12", "docker.io/library/debian:12"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("index.docker.io/library/debian:1", "docker.io/library/debian:1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:1", "localhost:5000/app:1"),
        ("127.0.0.1:5000/a/b/c:x", "127.0.0.1:5000/a/b/c:x"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("quay.io/a/b-c__d.e", "quay.io/a/b-c__d.e:latest"),
        (f"quay.io/a/b@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
        (f"quay.io/a/b:1@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
    ],
)
def test_parse_name_when_parts_are_left_out_then_filled_in(text: str, whole: str) -> None:
    assert parse_name(text, default_registry="docker.io").text == whole


def test_parse_name_when_default_registry_is_another_then_short_names_are_there() -> None:
    name = parse_name("debian", default_registry="registry.example:5000")
    assert name == RegistryName(host="registry.example:5000", repository="debian", tag="latest")
    assert name.selector == "latest"
    assert parse_name(f"a/b:1@{DIGEST}", default_registry="q.io").selector == DIGEST


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "repository ''"),
        ("Debian", "repository 'Debian'"),
        ("quay.io/", "repository ''"),
        ("quay.io/../etc", "repository '../etc'"),
        ("quay.io/a//b", "repository 'a//b'"),
        ("quay.io/a/../../b", "repository 'a/../../b'"),
        ("quay.io/a?b", "repository 'a?b'"),
        ("quay.io/a b", "repository 'a b'"),
        ("quay.io/" + "a" * 256, "repository"),
        ("a:", "tag ''"),
        ("a:-b", "tag '-b'"),
        ("a:" + "b" * 129, "tag"),
        ("a@sha256:12", "digest 'sha256:12'"),
        ("a@sha512:" + "0" * 128, "digest"),
        ("user:secret@quay.io/a", "digest 'quay.io/a'"),
        ("quay.io:99999/a", "host 'quay.io:99999'"),
        ("quay.io:port/a", "host 'quay.io:port'"),
        ("-x.io/a", "host '-x.io'"),
    ],
)
def test_parse_name_when_a_part_is_wrong_then_it_is_named(text: str, words: str) -> None:
    with pytest.raises(InvalidConfigError, match=words.replace("?", r"\?").replace(".", r"\.")) as caught:
        parse_name(text, default_registry="docker.io")
    assert caught.value.path == "image"


def test_parse_name_when_there_is_no_default_registry_then_a_short_name_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="no default registry"):
        parse_name("debian", default_registry="")
    assert parse_name("quay.io/a", default_registry="").host == "quay.io"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:5000", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:5000"]
)
def test_is_loopback_when_it_is_this_machine_then_true(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["localhost.example", "127.0.0.1.example", "10.0.0.1", "[2001:db8::1]:1", "docker.io", ""]
)
def test_is_loopback_when_it_may_be_another_machine_then_false(host: str) -> None:
    assert not is_loopback(host)


@given(st.text(alphabet="abcXYZ019./:@_-[]%? \n", max_size=60))
def test_parse_name_when_any_text_then_a_name_that_reads_back_or_the_one_error(text: str) -> None:
    try:
        name = parse_name(text, default_registry="docker.io")
    except InvalidConfigError:
        return
    assert parse_name(name.text, default_registry="other.example") == name
    assert not set(name.repository) & set(" \n?%#@:") and ".." not in name.repository.split("/")
