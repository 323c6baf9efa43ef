"""``casemate config``: our configuration documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from casemate.cli import options as common
from casemate.cli.document import read_document, to_toml
from casemate.config.container import ContainerConfig
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError

KINDS = ("sandbox", "container", "settings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``config``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print a document with its defaults")
    show.add_argument("kind", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    show.add_argument(
        "file", metavar="FILE", type=Path, nargs="?", default=None, help="TOML or JSON; without: the defaults"
    )
    common.add_json(show)
    check = actions.add_parser("check", help="read a document, tell its first fault")
    check.add_argument("kind", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    check.add_argument("file", metavar="FILE", type=Path, help="TOML or JSON")


def run(options: argparse.Namespace) -> int:
    """Show or check a document."""
    if options.action == "check":
        _load(options.kind, options.file)
        return 0
    document = _default(options.kind) if options.file is None else _load(options.kind, options.file)
    if options.json:
        common.print_json(document)
    else:
        print(to_toml(document), end="")
    return 0


def _load(kind: str, file: Path) -> object:
    document = read_document(file)
    try:
        if kind == "sandbox":
            return SandboxConfig.from_document(document)
        if kind == "container":
            return ContainerConfig.from_document(document)
        return Settings.from_document(document)
    except InvalidConfigError as error:
        error.add_note(f"in {file}")
        raise


def _default(kind: str) -> object:
    if kind == "sandbox":
        return SandboxConfig()
    if kind == "settings":
        return Settings.from_environment()
    raise InvalidConfigError("a container has no default image: give a file", path="image")
