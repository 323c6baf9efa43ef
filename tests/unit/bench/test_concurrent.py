from __future__ import annotations

import pytest

from casemate.bench.concurrent import Sample, figures


def test_figures_when_both_sides_are_known_then_the_ratio_of_processor_time_comes_first() -> None:
    made = figures([Sample(1000.0, 110.0, 9000.0)], [Sample(3000.0, 100.0, 9000.0)])

    assert [figure.name for figure in made] == ["own_cpu_of_10", "vmm_cpu_of_10", "wall_of_10"]
    assert made[0].ratio["plain"] == pytest.approx(1.1)
    assert made[2].ratio["plain"] == pytest.approx(1 / 3)
