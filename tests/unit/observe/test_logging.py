"""The library logs, and leaves to the program what becomes of it."""

from __future__ import annotations

import importlib
import logging
import pkgutil

import casemate
from casemate.observe.log import Log


def test_loggers_when_all_is_imported_then_each_is_its_modules_and_nobody_sets_a_handler() -> None:
    found = {}
    for module in pkgutil.walk_packages(casemate.__path__, "casemate."):
        if not module.name.endswith("__main__") and ".fake" not in module.name:
            logger = getattr(importlib.import_module(module.name), "_log", None)
            found[module.name] = logger
    loggers = {name: logger for name, logger in found.items() if isinstance(logger, Log)}
    assert len(loggers) > 10
    for name, logger in loggers.items():
        assert logger.name == name
        own = logging.getLogger(name)
        assert (own.handlers, own.propagate, own.level) == ([], True, logging.NOTSET)
    assert logging.getLogger("casemate").handlers == []
