"""References: what each form means, and which are refused."""

from __future__ import annotations

import pytest

from casemate.errors import InvalidConfigError
from casemate.images.reference import default_name, normalise_name, parse_reference


@pytest.mark.parametrize(
    ("text", "kind", "path", "tag"),
    [
        ("oci:./debian", "oci", "./debian", None),
        ("oci:/a/b:12", "oci", "/a/b", "12"),
        ("oci-archive:a.tar:v1.2-x", "oci-archive", "a.tar", "v1.2-x"),
        (
            "docker-archive:a.tar:docker.io/library/app:1",
            "docker-archive",
            "a.tar",
            "docker.io/library/app:1",
        ),
        ("./debian", "any", "./debian", None),
        ("debian:12", "any", "debian:12", None),
        ("/with:colon", "any", "/with:colon", None),
        ("docker:24", "any", "docker:24", None),
        ("docker://quay.io/a/b:1", "docker", "quay.io/a/b:1", None),
    ],
)
def test_parse_reference_when_form_is_known_then_parts(
    text: str, kind: str, path: str, tag: str | None
) -> None:
    reference = parse_reference(text)
    assert (reference.kind, reference.path, reference.tag, reference.text) == (kind, path, tag, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a path or a name"),
        ("a\0b", "a path or a name"),
        ("oci:", "no path"),
        ("oci::tag", "no path"),
        ("oci:path:", "tag ''"),
        ("oci:path:a b", "tag 'a b'"),
        ("http://debian", "docker://NAME or one of oci, oci-archive, docker-archive"),
        ("dir:/tmp/x", "one of oci, oci-archive, docker-archive"),
    ],
)
def test_parse_reference_when_form_is_wrong_then_error_says_what_is_expected(text: str, words: str) -> None:
    with pytest.raises(InvalidConfigError, match=words) as caught:
        parse_reference(text)
    assert caught.value.path == "image"


@pytest.mark.parametrize(
    ("path", "tag", "name"),
    [
        ("./Debian 12", None, "debian-12:latest"),
        ("/images/app.tar.gz", "1", "app:1"),
        ("x", "docker.io/library/app:1", "docker.io/library/app:1"),
        ("x", "registry:5000/app", "registry:5000/app:latest"),
        ("..", None, "image:latest"),
    ],
)
def test_default_name_when_path_and_tag_then_name(path: str, tag: str | None, name: str) -> None:
    assert default_name(path, tag) == name


def test_normalise_name_when_no_tag_then_latest() -> None:
    assert [normalise_name(name) for name in ("a", "a:1", "h:5000/a", "a@sha256:0")] == [
        "a:latest",
        "a:1",
        "h:5000/a:latest",
        "a@sha256:0",
    ]
