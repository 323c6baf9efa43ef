"""``casemate create``."""

from __future__ import annotations

import argparse

from casemate.cli import options as common
from casemate.cli.run import add_container_options, add_image_and_command, container_config
from casemate.config.container import ContainerConfig
from casemate.config.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``create``."""
    parser.epilog = (
        "The sandbox goes on when this command has ended, held by a keeper. Its name is printed: give it to "
        "start, exec, logs, attach and stop."
    )
    common.add_sandbox_options(parser)
    group = parser.add_argument_group("container")
    add_container_options(group)
    common.add_json(parser)
    add_image_and_command(parser, image_needed=False)


def run(options: argparse.Namespace) -> int:
    """Make a detached sandbox with a container that is not started, or with none; print its name."""
    containers = () if options.image is None else (container_config(options),)
    return make_detached(options, containers, start=False)


def make_detached(
    options: argparse.Namespace, containers: tuple[ContainerConfig, ...], *, start: bool
) -> int:
    """Make a sandbox that goes on without this process, print its name or with ``--json`` its record."""
    from casemate._sync.sandbox import Sandbox

    with Sandbox.create(
        common.sandbox_config(options),
        containers=containers,
        start=start,
        detached=True,
        settings=Settings.from_environment(),
        progress=common.progress_printer(),
    ) as sandbox:
        if options.json:
            common.print_json({"alive": True, "record": sandbox.inspect()})
        else:
            print(sandbox.id)
    return 0
