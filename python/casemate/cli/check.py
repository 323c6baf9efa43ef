"""``casemate check``."""

from __future__ import annotations

import argparse
import sys

from casemate.cli import options as common
from casemate.config.settings import Settings
from casemate.host.report import HostReport, look_at_host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``check``."""
    parser.add_argument("--boot", action="store_true", help="boot a guest with each accelerator as proof")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print what the host can do; 0 when sandboxes can start on it."""
    settings = Settings.from_environment()
    if options.boot:
        from casemate._sync.boot_proof import prove_boot

        proof = prove_boot(settings=settings, tell=_tell)
        report = look_at_host(settings, proof=proof)
    else:
        report = look_at_host(settings)
    if options.json:
        common.print_json(report)
    else:
        _print(report)
    return 0 if report.ok else 1


def _tell(line: str) -> None:
    print(f"casemate: {line}", file=sys.stderr)


def _print(report: HostReport) -> None:
    width = max(len(finding.name) for finding in report.findings)
    for finding in report.findings:
        print(f"{finding.state:<6}  {finding.name:<{width}}  {finding.text}")
        if finding.cure:
            print(f"{'':<6}  {'':<{width}}  -> {finding.cure}")
    print("sandboxes can start" if report.ok else "sandboxes can't start: see 'no' above")
