"""``casemate exec``."""

from __future__ import annotations

import argparse
import sys

from casemate.cli import options as common
from casemate.cli.run import add_process_options, command_words
from casemate.cli.terminal import attach
from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``exec``."""
    add_process_options(parser)
    parser.add_argument(
        "-c", "--container", default=None, help="which container; needed when there are several"
    )
    common.add_json(parser)
    parser.add_argument("name", metavar="SANDBOX")
    parser.add_argument("command_line", metavar="COMMAND", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int:
    """Run another command in a container, return its exit status."""
    from casemate._sync.sandbox import Sandbox

    command = command_words(options.command_line)
    if not command:
        raise InvalidConfigError("exec needs a command behind the sandbox's name", path="command")
    if options.tty and options.json:
        raise InvalidConfigError("--json and --tty exclude each other: a terminal has no JSON", path="json")
    env = common.environment(options.env)
    with Sandbox.attach(options.name, settings=Settings.from_environment()) as sandbox:
        container = sandbox.container(options.container)
        if options.json:
            data = sys.stdin.buffer.read() if options.interactive else None
            result = container.exec(
                command, capture=True, env=env, cwd=options.workdir, user=options.user, input=data
            )
            common.print_json(common.result_document(result))
            return result.exit_code
        process = container.exec(
            command, env=env, cwd=options.workdir, user=options.user, terminal=options.tty
        )
        return attach(process, stdin=options.interactive, wait=process.wait)
