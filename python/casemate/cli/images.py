"""``casemate images``: list, remove, collect."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.errors import CasemateError

if TYPE_CHECKING:
    from casemate.images import Image

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``images``."""
    common.add_json(parser)
    actions = parser.add_subparsers(metavar="ACTION", title="actions, without one: list")
    listing = actions.add_parser("ls", help="list")
    rm = actions.add_parser("rm", help="remove images", description="Remove images.")
    _add_remove_arguments(rm)
    rm.set_defaults(act=remove)
    gc = actions.add_parser(
        "gc",
        help="remove images that no start used for a while",
        description="Remove images that no start used for a while, and as old parts of downloads. What a sandbox uses stays.",
    )
    gc.add_argument(
        "--older-than",
        type=age_s,
        default=None,
        metavar="AGE",
        help="not used for that long: 30d (default), 12h, 0; the last hour always stays",
    )
    gc.add_argument("-n", "--dry-run", action="store_true", help="only tell")
    gc.set_defaults(act=collect)
    for action in (listing, rm, gc):
        # Before or behind the action; a default here would undo what was said before it.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def add_remove_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``rmi``."""
    common.add_json(parser)
    _add_remove_arguments(parser)


def _add_remove_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--force", action="store_true", help="also what a sandbox uses; it keeps the file it has open"
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="name, digest, or the digest's first digits"
    )


def age_s(text: str) -> float:
    """Seconds from ``30d``, ``12h``, ``90`` (seconds)."""
    digits, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    if not digits.isascii() or not digits.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no age; 30d, 12h or 90 (seconds) is expected")
    return float(int(digits) * _UNITS[unit])


def run(options: argparse.Namespace) -> int:
    """List the images, or do what was asked with them."""
    act = getattr(options, "act", show)
    return int(act(options))


def show(options: argparse.Namespace) -> int:
    """List the images that are here."""
    from casemate import images

    found = images.list_images(Settings.from_environment())
    if options.json:
        common.print_json([image_document(image) for image in found])
        return 0
    rows = [
        (image.name, image.digest[:19], image.fstype, f"{image.size_bytes / 1e6:.1f} MB") for image in found
    ]
    common.print_table(("NAME", "DIGEST", "FSTYPE", "SIZE"), rows)
    return 0


def remove(options: argparse.Namespace) -> int:
    """Remove images; what can't be removed is told, the others go all the same."""
    from casemate import images
    from casemate.cli import report

    settings = Settings.from_environment()
    removed = []
    for reference in options.images:
        try:
            images.remove(reference, settings, force=options.force)
        except CasemateError as error:
            report(error)
        else:
            removed.append(reference)
    if options.json:
        common.print_json({"removed": removed})
    elif removed:
        print("\n".join(removed))
    return 0 if len(removed) == len(options.images) else 1


def collect(options: argparse.Namespace) -> int:
    """Remove what nobody needs any more."""
    from casemate.images.collection import DEFAULT_AGE_S, collect_garbage

    older_than_s = DEFAULT_AGE_S if options.older_than is None else options.older_than
    collected = collect_garbage(
        Settings.from_environment(), older_than_s=older_than_s, dry_run=options.dry_run
    )
    if options.json:
        common.print_json(collected)
        return 0
    for name in collected.removed:
        print(name)
    what = "would be freed" if options.dry_run else "freed"
    print(f"{collected.freed_bytes / 1e6:.1f} MB {what}, {collected.kept} images stay", file=sys.stderr)
    return 0


def image_document(image: Image) -> dict[str, object]:
    """An image as ``--json`` tells it."""
    return {
        "name": image.name,
        "digest": image.digest,
        "fstype": image.fstype,
        "size_bytes": image.size_bytes,
        "rootfs": image.rootfs,
    }
