"""Counts of a test run: gather them from cargo, add them up, judge the skips.

``run FILE COMMAND…`` runs a cargo command, passes its output on and writes its counts to FILE.
``total [--no-lab] DIRECTORY`` prints one line a level and the sum; it fails when a test failed, none ran, or more
were skipped than ``skip_ceiling`` of ``pyproject.toml`` allows. With ``--no-lab`` nobody asked for the lab, and its
tests are no skipped ones; without it they are, when it did not start.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("passed", "failed", "skipped")
CARGO = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;")

Counts = dict[str, int]


def add(left: Counts, right: Counts) -> Counts:
    """The sum, kind by kind."""
    return {kind: left.get(kind, 0) + right.get(kind, 0) for kind in KINDS}


def count_cargo(line: str) -> Counts:
    """The counts that one line of cargo's output tells; zeros when it tells none."""
    match = CARGO.match(line)
    numbers = map(int, match.groups()) if match else (0, 0, 0)
    return dict(zip(KINDS, numbers, strict=True))


def run(file: Path, command: list[str]) -> int:
    """Run ``command``, write its counts to ``file``, return 0, 1 when tests failed, else its exit status."""
    counts = count_cargo("")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            counts = add(counts, count_cargo(line))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"levels": {"rust": counts}, "skips": {}}), "utf-8")
    return 1 if counts["failed"] else process.returncode


def line_of(counts: Counts) -> str:
    """``N passed, N failed, N skipped``."""
    return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)


def total(directory: Path, ceiling: int, *, lab: bool = True) -> tuple[list[str], bool]:
    """Lines to print, and whether the run is good."""
    levels: dict[str, Counts] = {}
    skips: Counts = {}
    ran = {"host": count_cargo(""), "lab": count_cargo("")}
    deferred: set[str] = set()
    ran_in_lab: set[str] = set()
    hosts: dict[str, str] = {}
    for file in sorted(directory.glob("*.json")):
        document = json.loads(file.read_text("utf-8"))
        where = document.get("where", "host")
        if "host" in document:
            hosts[where] = document["host"]
        for level, counts in document["levels"].items():
            name = level if where == "host" else f"lab: {level}"
            levels[name] = add(levels.get(name, {}), counts)
            ran[where] = add(ran[where], counts)
        for reason, number in document["skips"].items():
            skips[reason] = skips.get(reason, 0) + number
        tests = document.get("tests", {})
        deferred |= {test for test, facts in tests.items() if facts["outcome"] == "deferred"}
        ran_in_lab |= tests.keys() if where == "lab" else set()
    if lab and "lab" not in hosts and deferred:
        # Nobody ran them: they are skipped tests like others.
        skips["the lab was not started"] = len(deferred)
        levels["lab"] = add({"skipped": len(deferred)}, {})
        deferred = set()
    whole = count_cargo("")
    for counts in levels.values():
        whole = add(whole, counts)
    lines = [f"  {level:<16} {line_of(counts)}" for level, counts in sorted(levels.items())]
    lines += [f"  skipped {number} × {reason}" for reason, number in sorted(skips.items())]
    lines += [f"  {where}: {host}" for where, host in sorted(hosts.items())]
    if left := len(deferred - ran_in_lab):
        lines.append(f"  left to ./dev test --all: {left} of the lab's tests")
    lines += [f"  ceiling of skips: {ceiling}"]
    places = {"host": "on this host", "lab": "in the lab"}
    lines += [f"  ran {places[where]}: {line_of(counts)}" for where, counts in ran.items()]
    lines.append(line_of(whole))
    good = whole["failed"] == 0 and whole["passed"] > 0
    if whole["skipped"] > ceiling:
        lines.insert(0, f"too many tests were skipped: {whole['skipped']}, at most {ceiling} are allowed")
        good = False
    return lines, good


def main(arguments: list[str]) -> int:
    """Exit status."""
    match arguments:
        case ["run", file, *command] if command:
            return run(Path(file), command)
        case ["total", *options, directory] if options in ([], ["--no-lab"]):
            project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
            lines, good = total(
                Path(directory), project["tool"]["casemate"]["tests"]["skip_ceiling"], lab=not options
            )
            print("\n".join(lines))
            return 0 if good else 1
        case _:
            print(__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
