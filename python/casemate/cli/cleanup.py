"""``casemate cleanup``."""

from __future__ import annotations

import argparse
import sys

from casemate.cli import options as common
from casemate.cli import report
from casemate.config.settings import Settings
from casemate.errors import CasemateError, InvalidStateError
from casemate.persist.recovery import CleanupReport, cleanup, list_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``cleanup``."""
    parser.add_argument("--all", action="store_true", help="every sandbox whose owner is dead")
    common.add_json(parser)
    parser.add_argument("names", metavar="SANDBOX", nargs="*")
    parser.set_defaults(wrong_use=parser.error)


def run(options: argparse.Namespace) -> int:
    """Remove what dead owners left; print the names of what was removed. A living sandbox is an error only when it was named."""
    if bool(options.names) == options.all:
        options.wrong_use("name sandboxes, or use --all")
    settings = Settings.from_environment()
    done = []
    failed = 0
    for name in list_names(settings) if options.all else options.names:
        try:
            done.append(cleanup(settings, name))
        except CasemateError as error:
            if options.all and isinstance(error, InvalidStateError):
                continue
            report(error)
            failed = 1
            continue
        print_unverified(done[-1])
        if done[-1].removed and not options.json:
            print(name)
    if options.json:
        common.print_json(done)
    return failed


def print_unverified(cleaned: CleanupReport) -> None:
    """Warn of what a cleanup could not look up."""
    for sentence in cleaned.unverified:
        print(f"casemate: warning: {cleaned.sandbox_id}: {sentence}", file=sys.stderr)
