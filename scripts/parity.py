"""Check ``docs/parity.md`` against the list of specification IDs.

Every ID of ``docs/parity-ids.txt`` has exactly one row ``| ID | state | test or reason |``; no
other ID has one; a row that is ``done`` or ``differs`` names tests that exist.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATES = ("open", "done", "differs", "later")
ROW = re.compile(r"^\| ([A-Z]+-[A-Za-z0-9-]*[0-9][A-Za-z0-9]*) \| ([a-z]+) \| (.*) \|$")
TEST = re.compile(r"`([^`\s]+::[^`\s]+)`")


def check(parity: str, ids: set[str], root: Path) -> list[str]:
    """Return one line for each fault in the text of a parity table."""
    faults: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(parity.splitlines(), 1):
        match = ROW.match(line)
        if match is None:
            if line.startswith("| ") and not line.startswith(("| ID ", "| --- ")):
                faults.append(f"line {number}: not a row: {line}")
            continue
        spec_id, state, note = match.groups()
        if spec_id in seen:
            faults.append(f"line {number}: {spec_id} stands twice")
        seen.add(spec_id)
        if spec_id not in ids:
            faults.append(f"line {number}: {spec_id} is unknown")
        if state not in STATES:
            faults.append(f"line {number}: state {state!r}, expected one of {', '.join(STATES)}")
        if state in ("differs", "later") and not note.strip():
            faults.append(f"line {number}: {spec_id} is {state} without a reason")
        faults += _check_tests(number, spec_id, state, note, root)
    faults += [f"{spec_id} has no row" for spec_id in sorted(ids - seen)]
    return faults


def _check_tests(number: int, spec_id: str, state: str, note: str, root: Path) -> list[str]:
    tests = TEST.findall(note)
    if state == "done" and not tests:
        return [f"line {number}: {spec_id} is done without a test"]
    faults = []
    for test in tests:
        path, _, name = test.partition("::")
        file = root / path
        if not file.is_file():
            faults.append(f"line {number}: {spec_id}: no file {path}")
        elif not re.search(rf"\b(?:def|fn) {re.escape(name.split('[')[0])}\b", file.read_text("utf-8")):
            faults.append(f"line {number}: {spec_id}: no test {name} in {path}")
    return faults


def main() -> int:
    """Print the faults and the counts of states; exit status 1 when there is a fault."""
    parity = (ROOT / "docs" / "parity.md").read_text("utf-8")
    ids = set((ROOT / "docs" / "parity-ids.txt").read_text("utf-8").split())
    faults = check(parity, ids, ROOT)
    for fault in faults:
        print(f"docs/parity.md: {fault}", file=sys.stderr)
    states = [match[2] for match in map(ROW.match, parity.splitlines()) if match]
    print("parity: " + ", ".join(f"{states.count(state)} {state}" for state in STATES))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
