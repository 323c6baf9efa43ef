"""The document of ``casemate bench rpc``, from a run that is as short as it can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from casemate.bench import peers, rpc
from casemate.cli import main

NAMES = ["64b_sync", "64b_async", "64kib_sync", "64kib_async", "pipelined_sync", "pipelined_async"]


def test_bench_rpc_when_no_peer_can_be_built_then_ours_is_measured_and_each_peer_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CASEMATE_CACHE", str(tmp_path))
    monkeypatch.setattr(peers, "SOURCES", tmp_path / "nowhere")
    # What is tested here must not run before other work of the machine.
    monkeypatch.setattr("os.setpriority", lambda which, who, priority: None)
    assert main(["bench", "rpc", "--json", "--no-vsock", "-n", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bench"] == "rpc"
    assert [figure["name"] for figure in report["figures"]] == NAMES
    assert set(report["absent"]) == {"raw", "rust", "go"}
    for figure in report["figures"]:
        assert (figure["unit"], figure["better"], figure["failures"]) == ("us", "lower", 0)
        assert figure["n"] == rpc.SHAPES[figure["name"].rpartition("_")[0]].count
        assert 0 < figure["ours"]["p50"] <= figure["ours"]["p90"] <= figure["ours"]["p99"]
        assert (figure["peers"], figure["ratio"]) == ({}, {})


def test_figures_when_peers_were_measured_then_each_has_its_ratio() -> None:
    def side(value: float) -> rpc.Side:
        made = rpc.Side.__new__(rpc.Side)
        made.wall_us = {key: [value] for key in rpc.SHAPES}
        made.cpu_us = {key: [value / 2] for key in rpc.SHAPES}
        return made

    sides = {"sync": side(6.0), "async": side(12.0)}
    figures = rpc._figures("vsock_", sides, {"raw": side(4.0), "go": side(24.0)})
    assert [figure.name for figure in figures] == [f"vsock_{name}" for name in NAMES]
    assert [figure.ratio for figure in figures] == [
        {"raw": 1.5, "go": 0.25},
        {"raw": 3.0, "go": 0.5},
    ] * len(rpc.SHAPES)


def test_bench_when_the_count_is_no_count_then_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rpc", "-n", "0"]) != 0
    assert "1 to 10000" in capsys.readouterr().err
