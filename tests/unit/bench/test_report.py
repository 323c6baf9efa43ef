"""The document of a benchmark."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from casemate.bench import floor
from casemate.bench.plot import svg
from casemate.bench.report import Figure, Report, percentile, ratios, summarize, table


def example() -> Report:
    ours, peer = summarize([2.0, 4.0, 3.0], [1.0]), summarize([1.0, 2.0, 3.0])
    figure = Figure(
        name="first_byte",
        unit="ms",
        better="lower",
        n=3,
        failures=0,
        ours=ours,
        peers={"floor": peer},
        ratio=ratios(ours, {"floor": peer}),
    )
    phase = Figure(name="phase_plan", unit="ms", better="lower", n=3, failures=0, ours=summarize([1.0]))
    return Report(
        bench="startup",
        boundary="b",
        host={},
        versions={"v": "<1>"},
        figures=(figure, phase),
        absent={"go": "no go"},
    )


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.9, 3.7)])
def test_percentile_then_between_neighbours_by_proportion(share: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(value)


def test_percentile_when_nothing_was_measured_then_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_report_then_document_has_the_agreed_shape() -> None:
    document = msgspec.json.decode(msgspec.json.encode(example()))
    assert set(document) >= {"bench", "boundary", "host", "versions", "figures"}
    figure = document["figures"][0]
    assert set(figure) == {"name", "unit", "better", "n", "failures", "ours", "peers", "ratio"}
    assert set(figure["ours"]) == {"p50", "p90", "p99", "cpu"}
    assert figure["ratio"] == {"floor": 1.5}


def test_table_when_a_peer_is_absent_then_it_is_named() -> None:
    assert ("", "", "go", "absent", "no go", "", "", "") in table(example())


def test_svg_then_text_is_escaped_and_every_side_is_drawn() -> None:
    picture = svg(example())
    assert "&lt;1&gt;" in picture
    assert picture.count("<rect") >= 4


def test_byte_program_when_executed_then_prints_its_byte_and_ends(tmp_path: Path) -> None:
    program = tmp_path / "byte"
    program.write_bytes(floor.byte_program(bytes.fromhex("b83c00000031ff0f05")))
    program.chmod(0o755)
    done = subprocess.run([program], capture_output=True, timeout=10)
    assert (done.returncode, done.stdout) == (0, floor.BYTE)
