"""A session in a real terminal: its size, keys, and what is left of it afterwards."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate import Settings
from casemate.persist.store import list_records
from tests.support.tmux import Pane

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.tmux]

WAIT_S = 90
# A shell of the guest would answer to its own line being typed; what is waited for is never typed as it stands.
SHOW_SIZE = "echo si''ze $(stty size)"


@pytest.fixture
def pane(settings: Settings, tmp_path: Path) -> Iterator[Pane]:
    pane = Pane(tmp_path, columns=100, rows=30, wait_s=WAIT_S * settings.timeout_factor)
    try:
        yield pane
    finally:
        pane.close()


def start(pane: Pane, tmp_path: Path, image: str, *command: str) -> None:
    """Run a command in a terminal; the shell's settings before and after it go to files, its status to the screen."""
    words = shlex.join([sys.executable, "-m", "casemate", "run", "-it", "--name", "session", image, *command])
    script = tmp_path / "session.sh"
    script.write_text(
        f"stty -g >{tmp_path}/before\n{words}\necho sta''tus $?\nstty -g >{tmp_path}/after\necho fin''ished\n"
    )
    pane.type(f". {script}")


def settings_of_terminal(tmp_path: Path) -> tuple[str, str]:
    return (tmp_path / "before").read_text(), (tmp_path / "after").read_text()


def test_session_when_used_then_size_resize_and_ctrl_c_reach_the_guest_and_the_terminal_is_as_before(
    pane: Pane, tmp_path: Path, busybox: str
) -> None:
    start(pane, tmp_path, busybox, "sh")
    pane.wait_for("/ #")
    pane.type(SHOW_SIZE)
    pane.wait_for("size 30 100")

    pane.type("while [ \"$(stty size)\" != '40 120' ]; do sleep 0.1; done; echo fol''lowed")
    pane.resize(120, 40)
    pane.wait_for("followed")

    pane.type("echo beg''un; sleep 1000")
    pane.wait_for("begun")
    pane.press("C-c")
    pane.type("echo ali''ve $?")
    pane.wait_for("alive 130")

    pane.type("exit 7")
    pane.wait_for("finished")
    assert "status 7" in pane.text()
    before, after = settings_of_terminal(tmp_path)
    assert before == after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_session_when_casemate_is_signalled_then_the_command_ends_and_the_terminal_is_as_before(
    pane: Pane, tmp_path: Path, busybox: str, settings: Settings, number: signal.Signals
) -> None:
    start(
        pane, tmp_path, busybox, "sh", "-c", "trap 'exit 9' TERM HUP; echo u''p; while :; do sleep 0.1; done"
    )
    pane.wait_for("up")
    ((record, _),) = list_records(settings)

    os.kill(record.owner.pid, number)

    pane.wait_for("finished")
    assert "status 9" in pane.text()
    before, after = settings_of_terminal(tmp_path)
    assert before == after
    assert list(list_records(settings)) == []


def test_session_when_the_machine_dies_then_the_cause_is_told_and_the_terminal_is_as_before(
    pane: Pane, tmp_path: Path, busybox: str, settings: Settings
) -> None:
    start(pane, tmp_path, busybox, "sh", "-c", "echo u''p; exec sleep 1000")
    pane.wait_for("up")
    ((record, _),) = list_records(settings)
    assert record.vmm is not None

    os.kill(record.vmm.pid, signal.SIGKILL)

    text = pane.wait_for("finished")
    assert "status 125" in text
    assert "SIGKILL" in text
    # Told in a terminal that is one again: each line begins at the left.
    assert any(line.startswith("casemate: the virtual machine ended") for line in text.splitlines())
    before, after = settings_of_terminal(tmp_path)
    assert before == after


def test_session_when_ctrl_c_comes_while_it_boots_then_all_is_undone_and_the_terminal_is_as_before(
    pane: Pane, tmp_path: Path, busybox: str, settings: Settings
) -> None:
    start(pane, tmp_path, busybox, "sh")
    pane.wait_for(lambda _: any(record.vmm for record, _ in list_records(settings)))

    pane.press("C-c")

    pane.wait_for("finished")
    assert "status 130" in pane.text()
    before, after = settings_of_terminal(tmp_path)
    assert before == after
    assert list(list_records(settings)) == []
    assert list((settings.state_root / "sandboxes").iterdir()) == []


def test_session_when_its_terminal_is_closed_then_a_command_that_does_not_mind_ends_too(
    pane: Pane, tmp_path: Path, busybox: str, settings: Settings
) -> None:
    start(pane, tmp_path, busybox, "sh", "-c", "trap '' HUP; echo u''p; exec sleep 1000")
    pane.wait_for("up")
    ((record, _),) = list_records(settings)
    owner = os.pidfd_open(record.owner.pid)
    try:
        pane.close()

        assert select.select([owner], [], [], WAIT_S * settings.timeout_factor)[0]
    finally:
        os.close(owner)
    assert list(list_records(settings)) == []
    assert list((settings.state_root / "sandboxes").iterdir()) == []
