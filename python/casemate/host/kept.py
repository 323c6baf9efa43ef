"""Small documents that spare asking the host again. A damaged or foreign one is the same as none: it is made anew."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from casemate.observe.log import Log

__all__ = ["load", "store"]

_log = Log(__name__)

T = TypeVar("T")


def load(file: Path, kind: type[T]) -> T | None:
    """The document in ``file``; None when it is not there or can't be used. Blocks: for a file read."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        _log.debug(
            "what was kept is found out anew",
            extra={"op": "host.load", "target": str(file), "cause": str(error)},
        )
        return None


def store(file: Path, document: msgspec.Struct) -> bool:
    """Keep ``document`` in ``file``, whole or not at all; whether that could be done. Blocks: for a file write."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Not the module tempfile: it costs 8 ms to import.
        temporary = file.parent / f".{file.name}-{os.getpid()}-{os.urandom(4).hex()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "wb") as out:
                out.write(msgspec.json.encode(document))
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        # A cache that can't be written costs asking again, no more.
        _log.debug("not kept", extra={"op": "host.store", "target": str(file), "cause": str(error)})
        return False
    return True
