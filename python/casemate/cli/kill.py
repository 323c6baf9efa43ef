"""``casemate kill``."""

from __future__ import annotations

import argparse
import signal

from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``kill``."""
    parser.add_argument("-s", "--signal", default="KILL", help="name or number (default KILL)")
    parser.add_argument(
        "-c", "--container", default=None, help="which container; needed when there are several"
    )
    parser.add_argument("-a", "--all", action="store_true", help="all processes of the container")
    parser.add_argument("name", metavar="SANDBOX")


def signal_number(text: str) -> int:
    """The number of ``9``, ``KILL``, ``SIGKILL`` or ``sigkill``. Raises: InvalidConfigError."""
    try:
        if text.isdigit():
            return int(signal.Signals(int(text)))
        name = text.upper()
        return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])
    except (KeyError, ValueError) as error:
        raise InvalidConfigError(
            f"{text!r} is no signal; a name such as TERM or a number is expected", path="signal"
        ) from error


def run(options: argparse.Namespace) -> int:
    """Send a signal to a container."""
    from casemate._sync.sandbox import Sandbox

    number = signal_number(options.signal)
    with Sandbox.attach(options.name, settings=Settings.from_environment()) as sandbox:
        sandbox.container(options.container).kill(number, everyone=options.all)
    return 0
