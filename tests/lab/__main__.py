"""``./dev lab``: build the lab, run something in it, have a prompt in it, run the tests that this host can't. See ``docs/lab.md``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import msgspec

from casemate.config.settings import Settings
from casemate.errors import CasemateError
from casemate.guest.store import Store
from tests.lab import LabError, payload
from tests.lab.image import LabImage, ensure_image
from tests.lab.job import HOME, Job
from tests.lab.run import Limits, Outcome, run_job
from tests.lab.table import table

SMOKE_LIMIT_S = 600
WHOLE_LIMIT_S = 1800
SHELL_LIMIT_S = 24 * 3600


def main(arguments: list[str] | None = None) -> int:
    """Exit status: the job's, 1 when tests failed or the lab did not do its work, 2 for wrong use, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return Lab(options).act()
    except (LabError, CasemateError) as error:
        say(f"lab: {error}")
        return 1
    except KeyboardInterrupt:
        say("lab: interrupted; nothing of it is left")
        return 130


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./dev lab", description=__doc__)
    parser.add_argument("--boot-s", type=float, default=300.0, help="seconds until the lab must be up")
    parser.add_argument(
        "--vcpus", type=int, default=1, help="processors of the lab; they share one of the host's"
    )
    parser.add_argument("--limit-s", type=int, help="seconds that the job may take")
    parser.add_argument(
        "--from-tree",
        action="store_true",
        help="the package as it lies in this tree in place of a built wheel",
    )
    parser.add_argument("--output", type=Path, help="directory for logs and results (test-report/lab)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make the image, or say that it is there")
    commands.add_parser("shell", help="a prompt in the lab, with the package installed")
    run = commands.add_parser("run", help="run a command in the lab")
    run.add_argument("--package", action="store_true", help="with the package and the tests at hand")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="CMD")
    test = commands.add_parser("test", help="run the tests there that this host can't run")
    test.add_argument("--smoke", action="store_true", help="those alone that ./dev test runs")
    test.add_argument("--whole", action="store_true", help="also those that this host could run")
    test.add_argument("--report", type=Path, help="file for the counts, JSON")
    test.add_argument("tests", nargs="*", default=["tests"], help="files, directories or tests")
    return parser


class Lab:
    """One call of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        settings = Settings.from_environment()
        self._qemu = settings.qemu
        self._factor = settings.timeout_factor
        home = Path.home() / ".cache"
        self._cache = Path(os.environ.get("CASEMATE_LAB_CACHE") or home / "casemate-lab").absolute()
        self._kernels = (
            Path(os.environ.get("CASEMATE_TEST_CACHE") or home / "casemate-tests").absolute() / "guest"
        )
        self._output: Path = (options.output or payload.ROOT / "test-report" / "lab").absolute()

    def act(self) -> int:
        """Do what was asked for."""
        match self._options.command:
            case "build":
                say(f"lab: the image is {self._image().root}")
                return 0
            case "shell":
                return self._shell()
            case "run":
                return self._run(self._options.words)
            case _:
                return self._test()

    def _image(self) -> LabImage:
        return ensure_image(self._cache, self._kernels, timeout_factor=self._factor, say=say)

    def _run(self, words: list[str]) -> int:
        if not words:
            say("lab: run what? ./dev lab run uname -a")
            return 2
        limit_s = self._limit_s(WHOLE_LIMIT_S)
        if not self._options.package:
            return self._go(Job(command=words, limit_s=limit_s)).status
        image = self._image()
        with Store(self._cache).staging("run") as staging:
            return self._go(self._equipped(words, image, staging, limit_s), image).status

    def _shell(self) -> int:
        if not sys.stdin.isatty():
            say("lab: a shell needs a terminal; ./dev lab run CMD does not")
            return 2
        image = self._image()
        with Store(self._cache).staging("shell") as staging:
            job = self._equipped(["bash", "-i"], image, staging, self._limit_s(SHELL_LIMIT_S))
            say(f"lab: starting; leave with exit; {HOME}/out comes back to {self._output}")
            with _raw_terminal():
                return self._go(
                    msgspec.structs.replace(job, shell=True), image, keyboard_fd=sys.stdin.fileno()
                ).status

    def _equipped(self, words: list[str], image: LabImage, staging: Path, limit_s: int) -> Job:
        """A job with package, libraries and tests at hand."""
        empty = staging / "tests.txt"
        empty.touch()
        job = payload.test_job(self._package(staging), self._libraries(image), empty, [], limit_s=limit_s)
        return msgspec.structs.replace(job, command=words)

    def _test(self) -> int:
        options = self._options
        limit_s = self._limit_s(SMOKE_LIMIT_S if options.smoke else WHOLE_LIMIT_S)
        try:
            with Store(self._cache).staging("test") as staging:
                tests = self._tests_for_lab(staging)
                if not tests.read_text("utf-8"):
                    say("lab: no test needs it on this host")
                    return 0
                image = self._image()
                libraries = self._libraries(image)
                package = self._package(staging)
                job = payload.test_job(package, libraries, tests, [], limit_s=limit_s)
                outcome = self._go(job, image)
            return self._tell(outcome, limit_s)
        except LabError:
            # No results are no success: this is counted where the tests would have been.
            self._report({"where": "lab", "levels": {"lab": {"failed": 1}}, "skips": {}, "tests": {}})
            raise

    def _tests_for_lab(self, staging: Path) -> Path:
        """Ask pytest on the host which tests it would leave to the lab."""
        options = self._options
        file = staging / "tests.txt"
        command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:randomly"]
        command += ["--lab-list", str(file), "-m", "lab_smoke" if options.smoke else "lab"]
        command += ["--lab-whole"] if options.whole else []
        done = subprocess.run([*command, *options.tests], cwd=payload.ROOT, capture_output=True, text=True)
        # 5: none was chosen.
        if done.returncode not in (0, 5) or not file.exists():
            raise LabError(f"the tests can't be collected:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        return file

    def _tell(self, outcome: Outcome, limit_s: int) -> int:
        file = self._output / "report.json"
        if not file.exists():
            why = f"its time of {limit_s} s was over" if outcome.status == 124 else f"status {outcome.status}"
            raise LabError(f"the tests in the lab left no report: {why}; {self._output} has the logs")
        document = json.loads(file.read_text("utf-8"))
        self._report(document)
        print(table(document["tests"]))
        return 0 if outcome.status == 0 else 1

    def _report(self, document: object) -> None:
        if self._options.report is not None:
            self._options.report.parent.mkdir(parents=True, exist_ok=True)
            self._options.report.write_text(json.dumps(document), "utf-8")

    def _libraries(self, image: LabImage) -> Path:
        return payload.ensure_libraries(self._cache, image.python, say=say, timeout_factor=self._factor)

    def _package(self, staging: Path) -> Path:
        if self._options.from_tree:
            return payload.ROOT / "python"
        return payload.build_package(staging, timeout_factor=self._factor)

    def _limit_s(self, default_s: int) -> int:
        return self._options.limit_s or int(default_s * self._factor)

    def _go(self, job: Job, image: LabImage | None = None, *, keyboard_fd: int | None = None) -> Outcome:
        outcome = run_job(
            job,
            image or self._image(),
            qemu=self._qemu,
            scratch=self._cache,
            results=self._output,
            limits=Limits(boot_s=self._options.boot_s * self._factor),
            output=sys.stdout.buffer,
            keyboard_fd=keyboard_fd,
            vcpus=self._options.vcpus,
        )
        say(
            f"lab: status {outcome.status}, up after {outcome.ready_s:.0f} s, off after {outcome.whole_s:.0f} s,"
            f" {outcome.cpu_s:.0f} s of processor time"
        )
        return outcome


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the lab, Ctrl-C too."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


if __name__ == "__main__":
    # Either removes what was made on the way out, also where a shell has made us ignore Ctrl-C, as it does in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
