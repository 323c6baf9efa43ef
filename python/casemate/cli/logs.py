"""``casemate logs``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from typing import TYPE_CHECKING

from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError
from casemate.persist.logs import parse_time_ns
from casemate.persist.store import load_record

if TYPE_CHECKING:
    from casemate._sync.logs import LogReader

_AGO = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``logs``."""
    parser.epilog = "What the container wrote on stdout goes to stdout, and stderr to stderr, byte for byte."
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on with what it writes, until it has ended"
    )
    parser.add_argument("-n", "--tail", type=_count, default=None, metavar="N", help="the last N lines only")
    parser.add_argument(
        "--since", default=None, metavar="TIME", help="from 10s, 5m, 2h or 1d ago, or 2026-11-25T00:33:27Z on"
    )
    parser.add_argument(
        "-t", "--timestamps", action="store_true", help="put the time before each line, all of it on stdout"
    )
    parser.add_argument(
        "-c", "--container", default=None, help="which container; needed when there are several"
    )
    parser.add_argument("name", metavar="SANDBOX")


def run(options: argparse.Namespace) -> int:
    """Print what a container of a detached sandbox wrote; also of one that is dead."""
    from casemate._sync.logs import open_logs

    settings = Settings.from_environment()
    record = load_record(settings, options.name)
    since_s = None if options.since is None else since_seconds(options.since, time.time())
    with open_logs(
        settings, record, options.container, follow=options.follow, since_s=since_s, tail=options.tail
    ) as reader:
        copy_log(reader, timestamps=options.timestamps)
    return 0


def copy_log(reader: LogReader, *, timestamps: bool = False) -> None:
    """Write entries to this process's stdout and stderr, as they come. Blocks: until the last one."""
    sys.stdout.flush()
    open_lines: set[str] = set()
    for entry in reader:
        fd = 1 if timestamps or entry.stream == "stdout" else 2
        head = b""
        if timestamps and entry.stream not in open_lines:
            head = f"{_time_text(entry.time_unix_ns)} {entry.stream}: ".encode()
        (open_lines.discard if entry.ends_line else open_lines.add)(entry.stream)
        view = memoryview(head + entry.data)
        while view:
            view = view[os.write(fd, view) :]


def since_seconds(text: str, now_s: float) -> float:
    """Seconds since 1970 of ``5m`` (ago) or of a UTC time. Raises: InvalidConfigError."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return now_s - float(ago[1]) * _SECONDS[ago[2]]
    try:
        return parse_time_ns(text) / 1e9
    except ValueError as error:
        raise InvalidConfigError(
            f"--since {text!r} is no time; 10s, 5m, 2h, 1d or 2026-11-25T00:33:27Z is expected", path="since"
        ) from error


def _time_text(unix_ns: int) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_ns // 1_000_000_000))
    return f"{whole}.{unix_ns % 1_000_000_000:09d}Z"


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)
