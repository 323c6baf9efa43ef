"""The lab's runner against a stand-in for QEMU: what it says of each end, and what it leaves."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import LabError, run
from tests.lab.image import LabImage
from tests.lab.job import Job
from tests.lab.run import Limits, Outcome, run_job
from tests.support.fake_lab import write_fake_qemu

WORKS = """
say("firmware says hello")
say("casemate-lab: ready after 3 s")
os.write(job, b"output of the job\\n")
leave(status="7\\n", note="kept")
say("casemate-lab: ended with 7")
"""

Run = Callable[..., Outcome]


@pytest.fixture
def fake_run(tmp_path: Path) -> Run:
    """Runs a job in the stand-in that the script makes; its disks are in ``scratch``, its results in ``results``."""

    def start(
        script: str, *, limit_s: int = 30, limits: Limits | None = None, output: io.BytesIO | None = None
    ) -> Outcome:
        return run_job(
            Job(command=["true"], limit_s=limit_s),
            LabImage(key="k", kernel=tmp_path / "vmlinux", root=tmp_path / "root", python="3.11"),
            qemu=write_fake_qemu(tmp_path / "qemu", script),
            scratch=tmp_path / "scratch",
            results=tmp_path / "results",
            limits=limits or Limits(boot_s=30, grace_s=30),
            output=output or io.BytesIO(),
        )

    return start


def scratch_is_empty(directory: Path) -> bool:
    return not list((directory / "scratch" / "tmp").iterdir())


def test_run_job_when_lab_does_its_work_then_output_logs_and_results_come_back(
    fake_run: Run, tmp_path: Path
) -> None:
    output = io.BytesIO()
    outcome = fake_run(WORKS, output=output)
    assert outcome.status == 7
    assert output.getvalue() == b"output of the job\n"
    assert (tmp_path / "results/note").read_text() == "kept"
    assert (tmp_path / "results/job.log").read_text() == "output of the job\n"
    assert "firmware says hello" in (tmp_path / "results/console.log").read_text()
    assert scratch_is_empty(tmp_path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "say('casemate-lab: fault: no KVM in the lab: its processor shows no svm')",
            "^no KVM in the lab: its processor shows no svm$",
        ),
        (
            "say('VFS: cannot open root'); sys.stderr.write('qemu: bad disk\\n'); sys.exit(1)",
            "(?s)ended with status 1 before the lab was ready: qemu: bad disk\nits console ends with:\n  VFS: cannot open root$",
        ),
        (
            "say('casemate-lab: ready'); say('Kernel panic'); os.kill(os.getpid(), 9)",
            "(?s)went down in the middle of its job \\(QEMU's status -9\\).*  Kernel panic$",
        ),
        ("say('casemate-lab: ready'); say('casemate-lab: ended with 0')", "no whole results"),
    ],
    ids=["no svm", "no boot", "crash", "no results"],
)
def test_run_job_when_lab_fails_then_says_why_and_leaves_nothing(
    fake_run: Run, tmp_path: Path, script: str, message: str
) -> None:
    with pytest.raises(LabError, match=message):
        fake_run(script)
    assert scratch_is_empty(tmp_path)


def test_run_job_when_lab_does_not_come_up_then_is_killed_at_the_limit(fake_run: Run, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="(?s)did not come up within 2 s.*Loading Linux"):
        fake_run("say('Loading Linux'); time.sleep(1000)", limits=Limits(boot_s=2))
    assert scratch_is_empty(tmp_path)


def test_run_job_when_job_hangs_and_lab_does_not_end_it_then_is_killed_at_the_limit(
    fake_run: Run, tmp_path: Path
) -> None:
    with pytest.raises(LabError, match="did not end within 2 s of its job's start and was killed"):
        fake_run("say('casemate-lab: ready'); time.sleep(1000)", limit_s=1, limits=Limits(grace_s=1))
    assert scratch_is_empty(tmp_path)


def test_run_job_when_qemu_is_missing_then_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no-such-qemu is not there.*qemu-system-x86"):
        run_job(
            Job(command=["true"]),
            LabImage(key="k", kernel=tmp_path, root=tmp_path, python="3.11"),
            qemu="no-such-qemu",
            scratch=tmp_path / "scratch",
            results=tmp_path / "results",
            limits=Limits(),
            output=io.BytesIO(),
        )
    assert not (tmp_path / "scratch").exists()


OWNER = """
import io, sys
from pathlib import Path
from tests.lab.image import LabImage
from tests.lab.job import Job
from tests.lab.run import Limits, run_job
home = Path(sys.argv[1])
image = LabImage(key="k", kernel=home, root=home, python="3.11")
run_job(Job(command=["true"]), image, qemu=sys.argv[2], scratch=home / "scratch", results=home / "results",
        limits=Limits(), output=sys.stdout.buffer)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_run_job_when_its_owner_is_ended_then_qemu_ends_too(tmp_path: Path, number: signal.Signals) -> None:
    script = "say('casemate-lab: ready'); os.write(job, f'{os.getpid()}\\n'.encode()); time.sleep(1000)"
    qemu = write_fake_qemu(tmp_path / "qemu", script)
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), qemu],
        cwd=Path(run.__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.send_signal(number)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel ends it; there is no event for a stranger's child
    assert not Path(f"/proc/{pid}").exists()
    left = os.listdir(tmp_path / "scratch" / "tmp")
    assert len(left) == (1 if number == signal.SIGKILL else 0)
