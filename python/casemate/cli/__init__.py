"""The command line: ``casemate``. Results go to stdout, everything else to stderr.

Exit status: that of the container for ``run``, ``exec`` and ``attach``; else 0, 1 when an operation failed, 2 for wrong use, 125 when
one of these three failed before the command ran, 126 when the command can't be executed, 127 when there is no such command, 128 + n
when signal n ended it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = {
    "run": "make a sandbox, run one container in it, remove both",
    "create": "make a sandbox that goes on without this command; its container is not started",
    "start": "start what was created",
    "exec": "run another command in a container of a living sandbox",
    "logs": "show what a container of a detached sandbox wrote",
    "attach": "join this terminal to a container of a detached sandbox",
    "ps": "list sandboxes and their containers",
    "inspect": "show all that is known of a sandbox or an image",
    "kill": "send a signal to a container's first process",
    "stop": "end detached sandboxes and remove them",
    "rm": "remove a sandbox, or what a dead one left",
    "cleanup": "remove what dead owners left, from disk alone",
    "pull": "bring an image here from its registry, and unpack it",
    "images": "list, remove and collect the images that are here",
    "rmi": "remove images",
    "check": "tell what this host can do, with the cure for what it can't",
    "env": "show versions, paths and facts of host and VMM",
    "config": "show or check a configuration document, with its defaults",
    "guest": "build, show or list guest kernels and initrds",
    "bench": "measure, against peers in the same run",
    "completion": "print a shell's completion of this command line",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except KeyboardInterrupt:
        return 130


def _run(words: Sequence[str]) -> int:
    from casemate.cli.parser import build_parser, parse

    # Only the module of the chosen command is imported: start-up time is a feature.
    parser = build_parser(COMMANDS, only=next((word for word in words if not word.startswith("-")), ""))
    options = parse(parser, words)
    if options.version:
        from casemate import __version__

        print(__version__)
        return 0
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return 2
    return _guarded(options)


def _guarded(options: argparse.Namespace) -> int:
    from casemate.cli.interrupts import Interrupted, let_in
    from casemate.errors import CasemateError

    before_command = 125 if options.command in ("run", "exec", "attach") else 1
    try:
        with let_in(signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            return int(options.run(options))
    except Interrupted as error:
        return 128 + error.number
    except CasemateError as error:
        report(error)
        return int(getattr(error, "exit_code", before_command))
    except BaseExceptionGroup as group:
        interruption = group.subgroup(Interrupted)
        rest = group if interruption is None else group.split(Interrupted)[1]
        for one in () if rest is None else rest.exceptions:
            report(one)
        return before_command if interruption is None else 130
    except BrokenPipeError:
        # The reader of our output went away: nothing is left to say to it.
        sys.stderr.close()
        return 1


def report(error: BaseException) -> None:
    """Print an error for a person: its text, then its notes."""
    print(f"casemate: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"  {note}", file=sys.stderr)
