"""``casemate rm``."""

from __future__ import annotations

import argparse
import os
import select
import signal

from casemate.cli import report
from casemate.cli.cleanup import print_unverified
from casemate.config.settings import Settings
from casemate.errors import AlreadyExistsError, CasemateError, DeadlineExceededError
from casemate.persist.record import ProcessRecord
from casemate.persist.recovery import cleanup, list_names
from casemate.persist.store import is_owned, load_record, read_start_time_ticks

OWNER_END_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``rm``."""
    parser.add_argument(
        "-f", "--force", action="store_true", help="also when it lives: its owner is asked to end"
    )
    parser.add_argument("names", metavar="SANDBOX", nargs="+")


def run(options: argparse.Namespace) -> int:
    """Remove sandboxes."""
    settings = Settings.from_environment()
    failed = 0
    for name in options.names:
        try:
            _remove(settings, name, force=options.force)
            print(name)
        except CasemateError as error:
            report(error)
            failed = 1
    return failed


def _remove(settings: Settings, name: str, *, force: bool) -> None:
    if name not in list_names(settings):
        load_record(settings, name)  # says which there are
    if is_owned(settings, name):
        record = load_record(settings, name)
        is_detached = record.keeper == record.owner
        if not force:
            held = "is detached and lives" if is_detached else f"lives in process {record.owner.pid}"
            cure = "`casemate stop` or --force ends it" if is_detached else "use --force to end it there"
            raise AlreadyExistsError(f"sandbox {name!r} {held}; {cure}", sandbox_id=name)
        # A keeper that is asked to end ends the machine first, as any owner does.
        _end_owner(record.owner, settings.timeout_factor * OWNER_END_S)
    # A tidy owner has removed everything; one that was killed has not.
    print_unverified(cleanup(settings, name))


def _end_owner(owner: ProcessRecord, timeout_s: float) -> None:
    try:
        fd = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return
    try:
        if read_start_time_ticks(owner.pid) != owner.start_time_ticks:
            return
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if not select.select([fd], [], [], timeout_s)[0]:
            raise DeadlineExceededError(
                f"process {owner.pid} did not end within {timeout_s:.0f} s of SIGTERM",
                deadline_s=timeout_s,
                waited_s=timeout_s,
                op="sandbox.remove",
            )
    except ProcessLookupError:
        return
    finally:
        os.close(fd)
