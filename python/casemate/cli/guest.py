"""``casemate guest``: the kernels and initrds that guests boot from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.types import Progress

if TYPE_CHECKING:
    from casemate.guest import GuestAssets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``guest``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="fetch a kernel and make its initrd, unless they are there")
    build.add_argument("--refresh", action="store_true", help="look for a newer kernel of the series")
    show = actions.add_parser("show", help="what a guest would boot from; makes it when it is not there")
    for action in (build, show):
        action.add_argument(
            "--kernel",
            default=None,
            metavar="PATH",
            help="a kernel or .deb; also auto (default) or a series such as 6.12",
        )
        action.add_argument("--initrd", default=None, metavar="PATH", help="an initrd of your own")
        action.add_argument("--machine", default="q35", metavar="q35|microvm", help="default q35")
        common.add_json(action)
    listing = actions.add_parser("list", help="kernels and initrds in the cache")
    common.add_json(listing)


def run(options: argparse.Namespace) -> int:
    """Build, show or list guest assets."""
    settings = Settings.from_environment()
    if options.action == "list":
        return _list(options, settings)
    from casemate import guest

    assets = guest.resolve(
        options.kernel,
        options.initrd,
        machine=options.machine,
        settings=settings,
        progress=_steps(common.progress_printer()),
        refresh=options.action == "build" and options.refresh,
    )
    if options.json:
        common.print_json(_document(assets))
        return 0
    for name, value in _document(assets).items():
        text = " ".join(value) if isinstance(value, tuple) else "-" if value is None else value
        print(f"{name:<15} {text}")
    return 0


def _document(assets: GuestAssets) -> dict[str, object]:
    return {
        "kernel": str(assets.kernel),
        "kernel_release": assets.kernel_release,
        "kernel_source": assets.kernel_source,
        "initrd": None if assets.initrd is None else str(assets.initrd),
        "initrd_bytes": assets.initrd_bytes,
        "modules": assets.modules,
        "agent": assets.agent,
    }


def _list(options: argparse.Namespace, settings: Settings) -> int:
    from casemate.guest.store import Store

    store = Store(settings.cache_root / "guest")
    kernels, initrds = store.list_kernels(), store.list_initrds()
    if options.json:
        common.print_json(
            {
                "kernels": [
                    {
                        "id": entry.id,
                        "release": entry.release,
                        "source": entry.source,
                        "kernel": str(store.kernel_path(entry)),
                        "kernel_bytes": entry.kernel_bytes,
                        "stands_for": store.names_of(entry.id),
                    }
                    for entry in kernels
                ],
                "initrds": [
                    {
                        "path": str(store.initrd_path(record.key)),
                        "kernel_id": record.kernel_id,
                        "machine": record.machine,
                        "initrd_bytes": record.initrd_bytes,
                        "modules": record.modules,
                    }
                    for record in initrds
                ],
            }
        )
        return 0
    rows = [
        (
            entry.release,
            " ".join(store.names_of(entry.id)),
            f"{entry.kernel_bytes / 1e6:.1f} MB",
            entry.source,
        )
        for entry in kernels
    ]
    common.print_table(("KERNEL", "STANDS FOR", "SIZE", "SOURCE"), rows)
    if initrds:
        print()
    releases = {entry.id: entry.release for entry in kernels}
    initrd_rows = [
        (
            releases.get(record.kernel_id, record.kernel_id),
            record.machine,
            f"{record.initrd_bytes / 1e6:.1f} MB",
            len(record.modules),
        )
        for record in initrds
    ]
    common.print_table(("INITRD FOR", "MACHINE", "SIZE", "MODULES"), initrd_rows)
    return 0


def _steps(show: Callable[[Progress], None] | None) -> Callable[[str, int, int], None] | None:
    if show is None:
        return None

    def step(phase: str, done_bytes: int, total_bytes: int) -> None:
        show(Progress(phase=phase, done_bytes=done_bytes, total_bytes=total_bytes))

    return step
