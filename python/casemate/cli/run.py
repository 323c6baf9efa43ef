"""``casemate run``."""

from __future__ import annotations

import argparse
import sys

from casemate.cli import options as common
from casemate.cli.terminal import attach
from casemate.config.container import ContainerConfig
from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``run``."""
    common.add_sandbox_options(parser)
    group = parser.add_argument_group("container")
    group.add_argument(
        "-d",
        "--detach",
        action="store_true",
        help="let it go on in the background, and print the sandbox's name",
    )
    add_container_options(group)
    common.add_json(parser)
    add_image_and_command(parser)


def add_container_options(group: argparse._ActionsContainer) -> None:
    """Options of a new container: of ``run`` and ``create``."""
    add_process_options(group)
    group.add_argument(
        "--entrypoint", default=None, help="in place of the image's entry point; empty for none"
    )
    group.add_argument("--read-only", action="store_true", help="no writable layer")


def add_image_and_command(parser: argparse.ArgumentParser, *, image_needed: bool = True) -> None:
    """The image and what is run of it."""
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs=None if image_needed else "?",
        help="docker://NAME, oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE, a path or a known name",
    )
    parser.add_argument(
        "command_line", metavar="COMMAND", nargs=argparse.REMAINDER, help="in place of the image's command"
    )


def add_process_options(group: argparse._ActionsContainer) -> None:
    """Options that ``run`` and ``exec`` share."""
    group.add_argument("-i", "--interactive", action="store_true", help="pass standard input on")
    group.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    group.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable"
    )
    group.add_argument("-w", "--workdir", default=None, metavar="DIR", help="working directory")
    group.add_argument("-u", "--user", default=None, metavar="USER[:GROUP]", help="user, by name or number")


def command_words(words: list[str]) -> tuple[str, ...]:
    """The command behind the first argument; a leading ``--`` is not part of it."""
    return tuple(words[1:] if words[:1] == ["--"] else words)


def run(options: argparse.Namespace) -> int:
    """Run one container, return its exit status."""
    from casemate._sync.run import without_ports
    from casemate._sync.sandbox import Sandbox

    if options.tty and options.json:
        raise InvalidConfigError("--json and --tty exclude each other: a terminal has no JSON", path="json")
    container = container_config(options)
    if options.detach:
        return _run_detached(options, container)
    settings = Settings.from_environment()
    config = without_ports(common.sandbox_config(options))
    if options.json:
        return _run_captured(options, container, config, settings)
    with Sandbox.create(
        config, containers=(container,), start=True, settings=settings, progress=common.progress_printer()
    ) as sandbox:
        (only,) = sandbox.containers
        return attach(only.process, stdin=options.interactive, wait=only.wait)


def container_config(options: argparse.Namespace) -> ContainerConfig:
    """The container that the options of ``run`` or ``create`` ask for. Raises: InvalidConfigError."""
    return ContainerConfig(
        image=options.image,
        command=command_words(options.command_line) or None,
        entrypoint=None if options.entrypoint is None else tuple(options.entrypoint.split()),
        env=common.environment(options.env),
        cwd=options.workdir,
        user=options.user,
        terminal=options.tty,
        readonly_rootfs=options.read_only,
    )


def _run_detached(options: argparse.Namespace, container: ContainerConfig) -> int:
    from casemate.cli.create import make_detached

    if options.interactive:
        raise InvalidConfigError(
            "--detach and --interactive exclude each other: use `casemate attach -i` once it runs",
            path="interactive",
        )
    return make_detached(options, (container,), start=True)


def _run_captured(
    options: argparse.Namespace, container: ContainerConfig, config: object, settings: Settings
) -> int:
    from casemate._sync.run import run_container

    data = sys.stdin.buffer.read() if options.interactive else None
    result = run_container(container, config=config, settings=settings, input=data)  # type: ignore[arg-type]
    common.print_json(common.result_document(result))
    return result.exit_code
