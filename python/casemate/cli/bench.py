"""``casemate bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError

if TYPE_CHECKING:
    from casemate.bench.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench``."""
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    startup = benches.add_parser(
        "startup", help="call to the first byte of a container's output, against the floor"
    )
    common.add_sandbox_options(startup)
    startup.add_argument("-n", "--runs", type=int, default=5, help="how many starts (default 5)")
    startup.add_argument(
        "--image", default=None, help="image to start (default: a program that prints one byte)"
    )
    startup.add_argument("--plot", type=Path, default=None, metavar="FILE", help="write a picture, FILE.svg")
    common.add_json(startup)
    startup.add_argument("command_line", metavar="COMMAND", nargs="*", help="command in the image")
    hotplug = benches.add_parser(
        "hotplug", help="call to a disk or network interface that can be used in the guest, and back"
    )
    common.add_sandbox_options(hotplug)
    hotplug.add_argument("-n", "--runs", type=int, default=20, help="how many of each (default 20)")
    common.add_json(hotplug)
    rpc = benches.add_parser(
        "rpc",
        help="one call of the agent and 32 at once, against a raw client, Go's and the crate ttrpc",
        epilog="The peers are built from the repository with cargo and go; one that can't be is named in the output.",
    )
    common.add_sandbox_options(rpc)
    rpc.add_argument("-n", "--runs", type=int, default=20, help="how many slices of each client (default 20)")
    rpc.add_argument(
        "--no-vsock", action="store_true", help="leave out the sandbox and the figures over vsock"
    )
    common.add_json(rpc)


def run(options: argparse.Namespace) -> int:
    """Run a benchmark."""
    if not 1 <= options.runs <= 10000:
        raise InvalidConfigError(f"-n is {options.runs}, 1 to 10000 is expected", path="runs")
    benches = {"hotplug": _hotplug, "rpc": _rpc, "startup": _startup}
    return benches[options.bench](options)


def _hotplug(options: argparse.Namespace) -> int:
    from casemate.bench.hotplug import measure

    report = measure(
        common.sandbox_config(options),
        runs=options.runs,
        settings=Settings.from_environment(),
        progress=_progress,
    )
    return _print(report, as_json=options.json)


def _rpc(options: argparse.Namespace) -> int:
    from casemate.bench.rpc import measure

    report = measure(
        rounds=options.runs,
        settings=Settings.from_environment(),
        vsock=None if options.no_vsock else common.sandbox_config(options),
        progress=_progress,
    )
    return _print(report, as_json=options.json)


def _startup(options: argparse.Namespace) -> int:
    from casemate._sync.run import without_ports
    from casemate.bench.plot import svg
    from casemate.bench.startup import measure

    if options.plot is not None and options.plot.suffix != ".svg":
        raise InvalidConfigError(f"--plot {options.plot}: a name that ends in .svg is expected", path="plot")

    report = measure(
        without_ports(common.sandbox_config(options)),
        runs=options.runs,
        settings=Settings.from_environment(),
        image=options.image,
        command=tuple(options.command_line) or None,
        progress=_progress,
    )
    if options.plot is not None:
        options.plot.write_text(svg(report), "utf-8")
    return _print(report, as_json=options.json)


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _print(report: Report, *, as_json: bool) -> int:
    """Show a report; the exit status says whether all its first figure's runs came off."""
    from casemate.bench import report as reports

    if as_json:
        common.print_json(report)
    else:
        head, *rows = reports.table(report)
        common.print_table(head, rows)
    return 0 if report.figures and not report.figures[0].failures else 1
