"""States and identifiers."""

from __future__ import annotations

import itertools

import pytest

from casemate.errors import InvalidConfigError, InvalidStateError
from casemate.types import State, check_identifier, check_transition

LEGAL = {
    (State.READY, State.RUNNING),
    (State.READY, State.STOPPED),
    (State.RUNNING, State.PAUSED),
    (State.RUNNING, State.STOPPED),
    (State.PAUSED, State.RUNNING),
    (State.PAUSED, State.STOPPED),
    (State.STOPPED, State.RUNNING),
}


@pytest.mark.parametrize(("current", "wanted"), sorted(LEGAL))
def test_check_transition_when_legal_then_passes(current: State, wanted: State) -> None:
    check_transition(current, wanted)


@pytest.mark.parametrize(
    ("current", "wanted"), [pair for pair in itertools.product(State, State) if pair not in LEGAL]
)
def test_check_transition_when_illegal_then_both_states_are_named(current: State, wanted: State) -> None:
    with pytest.raises(InvalidStateError) as caught:
        check_transition(current, wanted, op="sandbox.test")
    assert (caught.value.state, caught.value.wanted, caught.value.op) == (current, wanted, "sandbox.test")


def test_state_then_only_the_four_real_states_are_valid() -> None:
    assert {state.value for state in State} == {"ready", "running", "paused", "stopped"}
    for text in ("creating", ""):
        with pytest.raises(ValueError):
            State(text)


@pytest.mark.parametrize("name", ["a", "Web-1", "0.x_y", "a" * 64])
def test_check_identifier_when_good_then_returned(name: str) -> None:
    assert check_identifier(name, "name") == name


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "a b", "ä", "a" * 65, "../x", "a\n"])
def test_check_identifier_when_bad_then_path_is_named(name: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        check_identifier(name, "name")
    assert caught.value.path == "name"
