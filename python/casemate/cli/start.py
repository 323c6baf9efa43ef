"""``casemate start``."""

from __future__ import annotations

import argparse

from casemate.config.settings import Settings
from casemate.errors import NotFoundError
from casemate.types import State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``start``."""
    parser.add_argument(
        "-c", "--container", default=None, help="which container; all that were not started when left out"
    )
    parser.add_argument("name", metavar="SANDBOX")


def run(options: argparse.Namespace) -> int:
    """Start containers that ``create`` has made; print their names."""
    from casemate._sync.sandbox import Sandbox

    with Sandbox.attach(options.name, settings=Settings.from_environment()) as sandbox:
        if options.container is not None:
            chosen = [sandbox.container(options.container)]
        else:
            chosen = [one for one in sandbox.containers if one.state is State.READY]
        if not chosen:
            raise NotFoundError(
                f"sandbox {options.name!r} has no container that waits for its start; `casemate ps` shows what runs",
                sandbox_id=options.name,
            )
        for container in chosen:
            container.start()
            print(container.id)
    return 0
