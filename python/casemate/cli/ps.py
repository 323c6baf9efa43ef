"""``casemate ps``."""

from __future__ import annotations

import argparse
import time

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.persist.store import list_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ps``."""
    parser.add_argument("-q", "--quiet", action="store_true", help="names only")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """List sandboxes and their containers; ``dead`` ones are left from an owner that was killed."""
    found = list(list_records(Settings.from_environment()))
    if options.json:
        common.print_json([{"alive": alive, "record": record} for record, alive in found])
        return 0
    if options.quiet:
        for record, _ in found:
            print(record.id)
        return 0
    now_ns = time.time_ns()
    rows = []
    for record, alive in found:
        age_s = max(now_ns - record.created_unix_ns, 0) // 1_000_000_000
        state = record.state.value if alive else "dead"
        head = (
            record.id,
            state,
            f"{age_s} s",
            f"{record.machine}/{record.accel}",
            record.vcpus,
            f"{record.memory_mib} MiB",
        )
        for container in record.containers or (None,):
            if container is None:
                rows.append((*head, "-", "-", "-"))
            else:
                rows.append((*head, container.id, container.image, " ".join(container.process.args)))
    common.print_table(
        ("SANDBOX", "STATE", "AGE", "MACHINE", "VCPUS", "MEMORY", "CONTAINER", "IMAGE", "COMMAND"), rows
    )
    return 0
