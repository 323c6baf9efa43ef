"""``casemate inspect``."""

from __future__ import annotations

import argparse

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.errors import NotFoundError
from casemate.persist.outcome import read_end, read_exits, with_outcomes
from casemate.persist.store import is_owned, load_record, sandboxes_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``inspect``."""
    common.add_json(parser)
    parser.add_argument("name", metavar="NAME", help="a sandbox, or an image as for run")


def run(options: argparse.Namespace) -> int:
    """Print all that is known of a sandbox, else of an image. Always JSON."""
    settings = Settings.from_environment()
    try:
        record = load_record(settings, options.name)
    except (NotFoundError, ValueError) as no_sandbox:
        from casemate import images

        try:
            common.print_json(images.resolve(options.name, settings=settings, pull_policy="never"))
        except NotFoundError as no_image:
            raise NotFoundError(f"{no_sandbox}; and {no_image}") from no_image
        return 0
    directory = sandboxes_root(settings) / record.id
    document: dict[str, object] = {
        "alive": is_owned(settings, record.id),
        "record": with_outcomes(record, directory),
    }
    if record.keeper is not None:
        document |= {"exits": read_exits(directory), "end": read_end(directory)}
    common.print_json(document)
    return 0
