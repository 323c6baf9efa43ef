"""The tree of parsers behind the command line: help as a page of a manual, and wrong words answered with the nearest right ones."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

__all__ = ["CommandParser", "build_parser", "parse", "subcommands", "summaries"]

_CHOICE = re.compile(
    r"^(?:argument (?P<what>[^:]+): )?invalid choice: (?P<given>'.*?'|\S+) \(choose from (?P<all>.*)\)$"
)


class CommandParser(argparse.ArgumentParser):
    """A parser whose help is its manual page, and whose errors name the nearest right word."""

    def __init__(self, **more: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)
        # The deepest parser that saw a part of the words wins: it answers for what nobody knew.
        self.set_defaults(answering=self)

    def format_help(self) -> str:
        """Usage, description, options, exit status and examples."""
        from casemate.cli.manual import page

        self.description, self.epilog = page(self.prog, self.description or "")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """End with status 2 and what was wrong, without the pages of usage."""
        print(f"{self.prog}: {_advise(message)}\nsee '{self.prog} --help'", file=sys.stderr)
        self.exit(2)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End with status 2 for words that nothing knows."""
        word = unknown[0]
        if word.startswith("-"):
            options = [text for action in self._actions for text in action.option_strings]
            self.error(f"unknown option {word.partition('=')[0]}{_nearest(word.partition('=')[0], options)}")
        self.error(f"too many arguments: {' '.join(unknown)}")


def build_parser(commands: Mapping[str, str], *, only: str | None = None) -> CommandParser:
    """The tree for ``commands``, names to summaries.

    Args:
        only: The command whose module is imported; None: all.
    """
    parser = CommandParser(prog="casemate", description="OCI containers inside virtual machines.")
    parser.add_argument("--version", action="store_true", help="print the version and end")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in commands.items():
        command = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if only is None or name == only:
            module = import_module(f"casemate.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def parse(parser: CommandParser, words: Sequence[str]) -> argparse.Namespace:
    """The options that ``words`` give. Ends the process with status 2 when they are wrong, as argparse does."""
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.answering.refuse(unknown)
    return options


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Names of the commands below ``parser`` to their parsers, in order."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def summaries(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Names of the commands below ``parser`` to what their parent says of them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {}


def _advise(message: str) -> str:
    """Argparse's message, in our words where a nearest right word can be named."""
    match = _CHOICE.match(message)
    if match is None:
        return message
    given = match["given"].strip("'")
    choices = [choice.strip().strip("'") for choice in match["all"].split(",")]
    kind = (match["what"] or "argument").lower()
    advice = _nearest(given, choices) or f"; one of {', '.join(choices)} is expected"
    return f"there is no {kind} {given!r}{advice}"


def _nearest(word: str, choices: Sequence[str]) -> str:
    import difflib  # only when something is wrong: 3 ms

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
