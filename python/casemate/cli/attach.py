"""``casemate attach``."""

from __future__ import annotations

import argparse

from casemate.cli import terminal
from casemate.cli.logs import copy_log
from casemate.config.settings import Settings
from casemate.errors import InvalidStateError
from casemate.types import State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``attach``."""
    parser.epilog = (
        "Signals go to the container's first process. What it wrote before is shown by `casemate logs`."
    )
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input on")
    parser.add_argument(
        "-c", "--container", default=None, help="which container; needed when there are several"
    )
    parser.add_argument("name", metavar="SANDBOX")


def run(options: argparse.Namespace) -> int:
    """Join this terminal to a container of a detached sandbox that runs; return its exit status."""
    from casemate._sync.sandbox import Sandbox

    with Sandbox.attach(options.name, settings=Settings.from_environment()) as sandbox:
        container = sandbox.container(options.container)
        if container.state is not State.RUNNING:
            ended = container.process.exit_code
            told = f"ended with status {ended}" if ended is not None else f"is {container.state.value}"
            raise InvalidStateError(
                f"attach needs a running container, {container.id} {told}; "
                "`casemate start` starts it, `casemate logs` shows what it wrote",
                state=container.state.value,
                wanted=State.RUNNING.value,
                op="container.attach",
                container_id=container.id,
            )
        with sandbox.logs(container.id, follow=True, tail=0) as reader:
            return terminal.attach(
                container.process,
                stdin=options.interactive,
                wait=container.wait,
                copy=lambda: copy_log(reader),
                keep_input=True,
            )
