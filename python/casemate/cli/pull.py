"""``casemate pull``."""

from __future__ import annotations

import argparse

from casemate.cli import options as common
from casemate.cli.images import image_document
from casemate.config.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pull``."""
    common.add_json(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--plain-http",
        action="store_true",
        help="speak to this registry without TLS; loopback addresses need no such word",
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="[docker://][HOST[:PORT]/]NAME[:TAG][@DIGEST]; without a host: the default registry (docker.io). "
        "Also a local reference, to unpack it ahead",
    )


def run(options: argparse.Namespace) -> int:
    """Pull one image; its name and digest go to stdout."""
    from msgspec.structs import replace

    from casemate import images
    from casemate.images.registry.name import parse_name

    settings = Settings.from_environment()
    if options.plain_http:
        host = parse_name(options.image, default_registry=settings.default_registry).host
        settings = replace(settings, plain_http_registries=(*settings.plain_http_registries, host))
    progress = None if options.quiet else common.progress_printer()
    image = images.pull(options.image, settings=settings, progress=progress)
    if options.json:
        common.print_json(image_document(image))
    else:
        print(image.name, image.digest)
    return 0
