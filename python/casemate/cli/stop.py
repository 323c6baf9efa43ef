"""``casemate stop``."""

from __future__ import annotations

import argparse

from casemate.cli import report
from casemate.config.settings import Settings
from casemate.errors import CasemateError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stop``."""
    parser.epilog = (
        "A sandbox that belongs to a running program ends with it; `casemate rm --force` ends that program. "
        "What a dead one left is removed by `casemate cleanup`."
    )
    parser.add_argument("names", metavar="SANDBOX", nargs="+")


def run(options: argparse.Namespace) -> int:
    """End detached sandboxes and remove them, with their logs; print their names."""
    from casemate._sync.sandbox import Sandbox

    settings = Settings.from_environment()
    failed = 0
    for name in options.names:
        try:
            with Sandbox.attach(name, settings=settings) as sandbox:
                sandbox.stop()
        except CasemateError as error:
            report(error)
            failed = 1
            continue
        print(name)
    return failed
