"""``casemate images``."""

from __future__ import annotations

import argparse

from casemate.cli import options as common
from casemate.config.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``images``."""
    common.add_json(parser)
    parser.add_argument(
        "--remove", metavar="IMAGE", action="append", default=[], help="remove an unpacked image"
    )


def run(options: argparse.Namespace) -> int:
    """List or remove unpacked images."""
    from casemate import images

    settings = Settings.from_environment()
    for reference in options.remove:
        images.remove(reference, settings=settings)
    if options.remove:
        return 0
    found = images.list_images(settings)
    if options.json:
        common.print_json(
            [
                {
                    "name": image.name,
                    "digest": image.digest,
                    "fstype": image.fstype,
                    "size_bytes": image.size_bytes,
                    "rootfs": image.rootfs,
                }
                for image in found
            ]
        )
        return 0
    rows = [
        (image.name, image.digest[:19], image.fstype, f"{image.size_bytes / 1e6:.1f} MB") for image in found
    ]
    common.print_table(("NAME", "DIGEST", "FSTYPE", "SIZE"), rows)
    return 0
