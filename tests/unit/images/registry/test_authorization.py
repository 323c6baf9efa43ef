"""``WWW-Authenticate`` as registries write it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.images.registry.authorization import Challenge, parse_challenges


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ()),
        (['Basic realm="a b"'], (Challenge("basic", {"realm": "a b"}),)),
        (
            ['Bearer realm="https://auth.example/token",service="registry",scope="repository:a/b:pull,push"'],
            (
                Challenge(
                    "bearer",
                    {
                        "realm": "https://auth.example/token",
                        "service": "registry",
                        "scope": "repository:a/b:pull,push",
                    },
                ),
            ),
        ),
        (
            ['Negotiate, Basic realm="x", bearer realm=https://y , service = "z"'],
            (
                Challenge("negotiate", {}),
                Challenge("basic", {"realm": "x"}),
                Challenge("bearer", {"realm": "https://y", "service": "z"}),
            ),
        ),
        (
            ["Basic realm=a", "Bearer realm=b"],
            (Challenge("basic", {"realm": "a"}), Challenge("bearer", {"realm": "b"})),
        ),
        ([r'Basic realm="a \"b\" \\"'], (Challenge("basic", {"realm": r'a "b" \ '.rstrip()}),)),
        (['Basic realm="x", realm="y"'], (Challenge("basic", {"realm": "x"}),)),
        (["Basic " + "x" * 9000], ()),
    ],
)
def test_parse_challenges_when_in_any_form_then_schemes_and_parameters(
    values: list[str], expected: tuple[Challenge, ...]
) -> None:
    assert parse_challenges(values) == expected


@given(st.lists(st.text(max_size=60), max_size=3))
def test_parse_challenges_when_any_text_then_no_error(values: list[str]) -> None:
    for challenge in parse_challenges(values):
        assert challenge.scheme == challenge.scheme.lower()
