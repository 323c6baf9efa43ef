"""``casemate ps``."""

from __future__ import annotations

import argparse
import time

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.persist.outcome import with_outcomes
from casemate.persist.record import ContainerRecord
from casemate.persist.store import list_records, sandboxes_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ps``."""
    parser.add_argument("-q", "--quiet", action="store_true", help="names only")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """List sandboxes and their containers; ``dead`` ones are left: their owner was killed, or their VMM has ended."""
    settings = Settings.from_environment()
    root = sandboxes_root(settings)
    found = [(with_outcomes(record, root / record.id), alive) for record, alive in list_records(settings)]
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
            "owned" if record.keeper is None else "detached",
            f"{age_s} s",
            f"{record.machine}/{record.accel}",
            record.vcpus,
            f"{record.memory_mib} MiB",
        )
        for container in record.containers or (None,):
            if container is None:
                rows.append((*head, "-", "-", "-", "-"))
            else:
                command = " ".join(container.process.args)
                rows.append((*head, container.id, status_text(container), container.image, command))
    common.print_table(
        (
            "SANDBOX",
            "STATE",
            "MODE",
            "AGE",
            "MACHINE",
            "VCPUS",
            "MEMORY",
            "CONTAINER",
            "STATUS",
            "IMAGE",
            "COMMAND",
        ),
        rows,
    )
    return 0


def status_text(container: ContainerRecord) -> str:
    """A container's state, and how it ended."""
    if container.exit_code is None:
        return container.state.value
    return f"exited ({container.exit_code})"
