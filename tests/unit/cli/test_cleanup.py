"""``casemate cleanup`` and ``casemate rm`` on what lies on disk. No virtual machine."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from casemate.cli import main
from casemate.config.settings import Settings
from casemate.persist import store
from casemate.types import SandboxId
from tests.unit.persist.test_recovery import dead_record
from tests.unit.persist.test_store import record


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sandboxes' directory with two dead ones: ``dead`` and ``damaged``."""
    monkeypatch.setenv("CASEMATE_STATE_ROOT", str(tmp_path))
    monkeypatch.setenv("CASEMATE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "sandboxes"
    for name, document in (("dead", msgspec.json.encode(dead_record())), ("damaged", b"{")):
        (root / name).mkdir(parents=True)
        (root / name / "lock").touch()
        (root / name / "state.json").write_bytes(document)
    return root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_cleanup_when_all_then_dead_ones_go_and_the_living_stays(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    living = store.SandboxDirectory.take(Settings.from_environment(), SandboxId("living"))
    living.write(record())
    assert main(["cleanup", "--all"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["damaged", "dead"]
    assert "warning: damaged: " in printed.err
    assert names(root) == ["living"]
    assert (living.path / "state.json").exists()
    living.remove()


def test_cleanup_when_the_living_is_named_then_status_1_and_the_others_go_all_the_same(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    living = store.SandboxDirectory.take(Settings.from_environment(), SandboxId("living"))
    living.write(record())
    assert main(["cleanup", "living", "dead"]) == 1
    printed = capsys.readouterr()
    assert printed.out.split() == ["dead"]
    assert "living process" in printed.err
    assert names(root) == ["damaged", "living"]
    living.remove()


def test_cleanup_when_json_then_a_document_for_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cleanup", "--json", "dead", "absent"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"sandbox_id": "dead", "removed": True, "ended_pids": [], "unverified": []},
        {"sandbox_id": "absent", "removed": False, "ended_pids": [], "unverified": []},
    ]
    assert names(root) == ["damaged"]


def test_cleanup_when_there_is_nothing_then_nothing_is_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cleanup", "absent"]) == 0
    assert capsys.readouterr() == ("", "")
    assert names(root) == ["damaged", "dead"]


@pytest.mark.parametrize("words", [[], ["--all", "dead"]])
def test_cleanup_when_neither_or_both_are_said_then_wrong_use(
    root: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cleanup", *words])
    assert ended.value.code == 2
    assert "--all" in capsys.readouterr().err
    assert names(root) == ["damaged", "dead"]


def test_rm_when_document_is_damaged_then_removed_with_a_warning(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rm", "damaged"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["damaged"]
    assert "warning" in printed.err
    assert names(root) == ["dead"]


def test_rm_when_a_damaged_one_lies_beside_then_an_unknown_name_is_still_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rm", "nobody"]) == 1
    assert "there are: damaged, dead" in capsys.readouterr().err
