"""``__all__`` is what the package really offers."""

from __future__ import annotations

import inspect

import casemate


def test_all_when_every_name_is_fetched_then_each_exists_and_has_a_docstring() -> None:
    for name in casemate.__all__:
        assert inspect.getdoc(getattr(casemate, name)), name


def test_all_then_it_is_sorted_and_free_of_doubles() -> None:
    assert sorted(set(casemate.__all__)) == list(casemate.__all__)


def test_public_names_when_all_are_loaded_then_they_equal_all() -> None:
    for name in casemate.__all__:
        getattr(casemate, name)
    # Submodules become attributes by being imported; they are no names of the package.
    found = {
        name
        for name, value in vars(casemate).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert found - {"TYPE_CHECKING", "Any", "annotations"} == set(casemate.__all__)


def test_errors_then_all_of_them_are_public() -> None:
    from casemate import errors

    assert set(errors.__all__) <= set(casemate.__all__)
