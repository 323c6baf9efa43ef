"""The command line against real sandboxes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate import Settings
from casemate.persist.store import list_records

pytestmark = [pytest.mark.root, pytest.mark.qemu]

CASEMATE = [sys.executable, "-m", "casemate"]


def casemate(*words: str, input: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CASEMATE, *words], input=input, capture_output=True, timeout=120)


@pytest.fixture
def living(busybox: str, settings: Settings) -> Iterator[str]:
    """The name of a sandbox that another process owns."""
    owner = subprocess.Popen(
        [*CASEMATE, "run", "-i", "--name", "living", busybox, "sh", "-c", "echo up; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == b"up\n"
        yield "living"
    finally:
        owner.communicate(timeout=60)


def test_run_when_command_fails_then_status_is_its_own(busybox: str, settings: Settings) -> None:
    done = casemate("run", busybox, "--", "sh", "-c", "exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"", b"")


def test_run_when_interactive_then_input_is_passed_on(busybox: str, settings: Settings) -> None:
    done = casemate("run", "-i", busybox, "--", "cat", input=b"hi\n")
    assert (done.returncode, done.stdout) == (0, b"hi\n"), done.stderr


def test_run_when_a_hundred_megabytes_are_written_then_they_arrive_whole(
    busybox: str, settings: Settings
) -> None:
    done = casemate("run", busybox, "head", "-c", "100000000", "/dev/zero")
    assert (done.returncode, len(done.stdout)) == (0, 100_000_000), done.stderr
    assert not any(done.stdout)


def test_run_when_options_are_given_then_they_hold_in_the_guest(busybox: str, settings: Settings) -> None:
    done = casemate(
        "run",
        "-e",
        "A=1",
        "-w",
        "/tmp",
        "-u",
        "7:8",
        "--vcpus",
        "2",
        "--memory",
        "300M",
        "--machine",
        "microvm",
        "--accel",
        "tcg",
        busybox,
        "sh",
        "-c",
        "echo $A $(pwd) $(id -u) $(id -g) $(nproc)",
    )
    assert (done.returncode, done.stdout) == (0, b"1 /tmp 7 8 2\n"), done.stderr


@pytest.mark.parametrize(("command", "status"), [("/nope", 127), ("/etc/passwd", 126)])
def test_run_when_command_cannot_be_executed_then_status_is_that_of_a_shell(
    busybox: str, settings: Settings, command: str, status: int
) -> None:
    done = casemate("run", busybox, command)
    assert done.returncode == status
    assert command.encode() in done.stderr


def test_run_when_json_is_asked_for_then_result_and_phases_are_printed(
    busybox: str, settings: Settings
) -> None:
    done = casemate("run", "--json", busybox, "sh", "-c", "echo out; echo err >&2; exit 3")
    document = json.loads(done.stdout)
    assert done.returncode == 3
    assert (document["exit_code"], document["stdout"], document["stderr"]) == (3, "out\n", "err\n")
    assert {phase["name"] for phase in document["timings"]} >= {"plan", "kernel", "first_byte", "teardown"}


def test_run_when_it_gets_a_terminal_then_the_guest_sees_one(busybox: str, settings: Settings) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*CASEMATE, "run", "-it", busybox, "sh", "-c", "tty; read x; echo got $x"],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(slave)
    output = b""
    try:
        while b"/dev/pts/" not in output and b"console" not in output:
            output += os.read(master, 4096)
        os.write(master, b"typed\r")
        while b"got typed" not in output:
            output += os.read(master, 4096)
        assert process.wait(60) == 0
    finally:
        os.close(master)
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_when_signalled_then_the_command_gets_it(
    busybox: str, settings: Settings, number: signal.Signals
) -> None:
    script = "trap 'echo caught; exit 9' TERM INT; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        [*CASEMATE, "run", busybox, "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (9, b"caught\n")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_run_when_signalled_while_it_boots_then_all_is_undone(
    busybox: str, settings: Settings, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [*CASEMATE, "run", busybox, "true"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while not any(record.vmm for record, _ in list_records(settings)):
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    assert list(list_records(settings)) == []
    assert list((settings.state_root / "sandboxes").iterdir()) == []


def test_commands_when_another_process_owns_the_sandbox_then_they_reach_it(
    living: str, settings: Settings
) -> None:
    assert casemate("exec", living, "echo", "there").stdout == b"there\n"
    assert casemate("exec", "-i", living, "cat", input=b"in").stdout == b"in"
    assert casemate("exec", living, "sh", "-c", "exit 4").returncode == 4
    assert casemate("exec", living, "nope").returncode == 127
    assert json.loads(casemate("exec", "--json", living, "id", "-u").stdout)["stdout"] == "0\n"

    (listed,) = json.loads(casemate("ps", "--json").stdout)
    assert (listed["record"]["id"], listed["alive"], listed["record"]["state"]) == (living, True, "running")
    assert living.encode() in casemate("ps").stdout
    inspected = json.loads(casemate("inspect", living).stdout)
    assert inspected["record"]["accel_reason"]
    assert inspected["record"]["containers"][0]["process"]["Args"] == ["sh", "-c", "echo up; cat"]

    assert casemate("rm", living).returncode == 1
    assert casemate("kill", "-s", "KILL", "--all", living).returncode == 0


def test_rm_when_forced_then_the_owner_ends_and_nothing_is_left(living: str, settings: Settings) -> None:
    done = casemate("rm", "--force", living)
    assert (done.returncode, done.stdout) == (0, b"living\n"), done.stderr
    assert json.loads(casemate("ps", "--json").stdout) == []


def test_images_when_one_was_used_then_name_and_digest_are_listed(busybox: str, settings: Settings) -> None:
    assert casemate("run", busybox, "true").returncode == 0
    listed = json.loads(casemate("images", "--json").stdout)
    assert all(one["digest"].startswith("sha256:") for one in listed)
    (chosen,) = [one for one in listed if one["name"] == f"{Path(busybox).name}:busybox"]
    assert Path(chosen["rootfs"]).is_file()
    assert json.loads(casemate("inspect", chosen["name"]).stdout)["digest"] == chosen["digest"]


def test_bench_startup_when_json_is_asked_for_then_the_figures_are_there(
    settings: Settings, tmp_path: Path
) -> None:
    picture = tmp_path / "startup.svg"
    done = casemate("bench", "startup", "--json", "-n", "1", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    figures = {figure["name"]: figure for figure in document["figures"]}
    first = figures["first_byte"]
    assert (document["bench"], first["unit"], first["better"], first["n"], first["failures"]) == (
        "startup",
        "ms",
        "lower",
        1,
        0,
    )
    assert set(first["ours"]) == {"p50", "p90", "p99", "cpu"}
    assert first["ratio"]["floor"] == pytest.approx(first["ours"]["p50"] / first["peers"]["floor"]["p50"])
    phases = {
        "plan",
        "vmm_spawn",
        "firmware",
        "kernel",
        "agent",
        "sandbox",
        "container",
        "first_byte",
        "teardown",
    }
    assert phases <= {name.removeprefix("phase_") for name in figures if name.startswith("phase_")}
    assert figures["own_cpu"]["ours"]["p50"] > 0
    assert picture.read_text().startswith("<svg")


def test_run_when_input_never_ends_and_the_vm_is_killed_then_the_cause_is_told_once(
    busybox: str, settings: Settings
) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*CASEMATE, "run", "-i", busybox, "sh", "-c", "echo up; sleep 1000"],
        stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"up\n"
        ((record, _),) = list_records(settings)
        assert record.vmm is not None
        os.kill(record.vmm.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
    assert process.returncode == 125
    assert b"SIGKILL" in said
    assert b"Traceback" not in said
