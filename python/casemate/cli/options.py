"""Options that several commands share, and output for machines and people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from casemate.config.sandbox import SandboxConfig
from casemate.errors import InvalidConfigError
from casemate.types import ExecResult, Progress, RunResult

__all__ = [
    "add_json",
    "add_sandbox_options",
    "environment",
    "print_json",
    "print_table",
    "progress_printer",
    "result_document",
    "sandbox_config",
]


def add_sandbox_options(parser: argparse.ArgumentParser) -> None:
    """Options that shape the virtual machine."""
    group = parser.add_argument_group("virtual machine")
    group.add_argument("--name", metavar="NAME", help="name of the sandbox")
    group.add_argument("--vcpus", type=int, default=None, metavar="N", help="virtual CPUs (default 1)")
    group.add_argument(
        "--memory",
        type=memory_mib,
        default=None,
        metavar="SIZE",
        help="guest memory: 512, 512M or 2G (plain: MiB)",
    )
    group.add_argument("--machine", default=None, metavar="q35|microvm", help="default q35")
    group.add_argument("--accel", default=None, metavar="auto|kvm|tcg", help="default auto")
    group.add_argument(
        "--kernel", default=None, metavar="PATH", help="guest kernel; also a series such as 6.12"
    )
    group.add_argument("--initrd", default=None, metavar="PATH", help="guest initrd")
    group.add_argument("--debug", action="store_true", help="more from kernel, agent and VMM")


def memory_mib(text: str) -> int:
    """Memory in MiB from ``512``, ``512M``, ``512MiB``, ``2G``."""
    units = {"": 1, "m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024}
    digits = text.rstrip("abgimABGIM")
    unit = units.get(text[len(digits) :].lower())
    if unit is None or not digits.isascii() or not digits.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 512, 512M or 2G is expected")
    return int(digits) * unit


def sandbox_config(options: argparse.Namespace, **more: Any) -> SandboxConfig:
    """The configuration that the options ask for. Raises: InvalidConfigError."""
    given = {
        "name": options.name,
        "vcpus": options.vcpus,
        "memory_mib": options.memory,
        "machine": options.machine,
        "accel": options.accel,
        "kernel": options.kernel,
        "initrd": options.initrd,
        "debug": options.debug or None,
        **more,
    }
    return SandboxConfig(**{name: value for name, value in given.items() if value is not None})


def environment(entries: Sequence[str]) -> dict[str, str]:
    """Variables from ``NAME=VALUE``, or ``NAME`` for this process's value. Raises: InvalidConfigError."""
    variables = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not name:
            raise InvalidConfigError(f"-e {entry!r}: NAME=VALUE or NAME is expected", path="env")
        if separator:
            variables[name] = value
        elif name in os.environ:
            variables[name] = os.environ[name]
    return variables


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(value: object) -> None:
    """Print a document to stdout."""
    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()
    print(text)


def result_document(result: ExecResult) -> dict[str, object]:
    """The document of a captured process: its output as text beside what else is known."""
    document: dict[str, object] = {
        "exit_code": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
    }
    if isinstance(result, RunResult):
        document |= {
            "sandbox_id": result.sandbox_id,
            "guest_kernel": result.guest_kernel,
            "timings": result.timings,
        }
    return document


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print columns to stdout."""
    lines = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def progress_printer() -> Callable[[Progress], None] | None:
    """A bar on stderr for builds and unpacking, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    shown = ""

    def show(event: Progress) -> None:
        nonlocal shown
        done, total = event.done_bytes, event.total_bytes
        share = min(done / total, 1.0) if total else 0.0
        bar = "#" * int(share * 24)
        line = f"{event.phase:<28.28} [{bar:<24}] {done / 1e6:8.1f} MB"
        if total and done >= total:
            line += "\n"
        if line != shown:
            sys.stderr.write("\r" + line)
            sys.stderr.flush()
            shown = line

    return show
