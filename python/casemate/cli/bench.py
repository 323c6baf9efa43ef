"""``casemate bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError


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


def run(options: argparse.Namespace) -> int:
    """Run a benchmark."""
    from casemate._sync.run import without_ports
    from casemate.bench import report as reports
    from casemate.bench.plot import svg
    from casemate.bench.startup import measure

    if not 1 <= options.runs <= 10000:
        raise InvalidConfigError(f"-n is {options.runs}, 1 to 10000 is expected", path="runs")
    if options.plot is not None and options.plot.suffix != ".svg":
        raise InvalidConfigError(f"--plot {options.plot}: a name that ends in .svg is expected", path="plot")

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    report = measure(
        without_ports(common.sandbox_config(options)),
        runs=options.runs,
        settings=Settings.from_environment(),
        image=options.image,
        command=tuple(options.command_line) or None,
        progress=progress,
    )
    if options.plot is not None:
        options.plot.write_text(svg(report), "utf-8")
    if options.json:
        common.print_json(report)
    else:
        head, *rows = reports.table(report)
        common.print_table(head, rows)
    return 0 if report.figures and not report.figures[0].failures else 1
