from __future__ import annotations

import platform

import pytest

from casemate import _core


def test_tsc_khz_measured_twice_agrees() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 processor")

    first, second = _core.tsc_khz(), _core.tsc_khz()

    assert first is not None
    assert second is not None
    assert first == pytest.approx(second, rel=0.002)
