"""Loggers of the standard library that are imported by who reads them.

Importing ``logging`` takes a sixth of all that naming a sandbox costs. A line below a warning goes nowhere unless the program has set
logging up, and for that it has imported it: so without it such a line is nothing. A warning imports it, and comes out as it always does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["Log"]


class Log:
    """As ``logging.getLogger(name)``, as far as casemate uses it. Event first, what belongs to it in ``extra``."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def debug(
        self, event: str, *, extra: Mapping[str, Any] | None = None, exc_info: BaseException | None = None
    ) -> None:
        """One line for each operation. Does nothing in a program that has not imported logging."""
        self._write("debug", event, extra, exc_info)

    def info(
        self, event: str, *, extra: Mapping[str, Any] | None = None, exc_info: BaseException | None = None
    ) -> None:
        """A change of state that an operator wants to see. As :meth:`debug`."""
        self._write("info", event, extra, exc_info)

    def warning(
        self, event: str, *, extra: Mapping[str, Any] | None = None, exc_info: BaseException | None = None
    ) -> None:
        """Casemate goes on, but someone should look."""
        import logging

        logging.getLogger(self.name).warning(event, extra=extra, exc_info=exc_info, stacklevel=2)

    def error(
        self, event: str, *, extra: Mapping[str, Any] | None = None, exc_info: BaseException | None = None
    ) -> None:
        """Casemate gave something up."""
        import logging

        logging.getLogger(self.name).error(event, extra=extra, exc_info=exc_info, stacklevel=2)

    def _write(
        self, level: str, event: str, extra: Mapping[str, Any] | None, exc_info: BaseException | None
    ) -> None:
        logging = sys.modules.get("logging")
        # Another thread may be at importing it: then it is not set up either.
        make = getattr(logging, "getLogger", None)
        if make is not None:
            getattr(make(self.name), level)(event, extra=extra, exc_info=exc_info, stacklevel=3)
