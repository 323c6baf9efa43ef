from __future__ import annotations

import pytest

from casemate.bench.hotplug import Sample, figures
from casemate.cli import main

SAMPLES = [
    Sample(100.0, 2.0, {"qemu.blockdev_add": 1.0, "qemu.device_add": 9.0, "guest.there": 60.0}),
    Sample(120.0, 4.0, {"tap.create": 5.0, "qemu.device_add": 20.0, "guest.there": 80.0}),
]


def test_figures_when_steps_are_known_then_the_whole_is_split_by_who_needs_the_time() -> None:
    made = {figure.name: figure for figure in figures("attach_block", SAMPLES, 1)}

    assert {name: figure.ours.p50 for name, figure in made.items()} == {
        "attach_block": 110.0,
        "attach_block_vmm": 15.0,
        "attach_block_guest": 70.0,
        "attach_block_own_cpu": 3.0,
    }
    assert made["attach_block"].ours.cpu == 3.0
    assert {(figure.n, figure.failures) for figure in made.values()} == {(3, 1)}


def test_bench_when_runs_are_out_of_range_then_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "hotplug", "-n", "0"]) != 0
    assert "1 to 10000" in capsys.readouterr().err
