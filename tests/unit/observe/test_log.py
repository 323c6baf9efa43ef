from __future__ import annotations

import subprocess
import sys

import pytest

from casemate.observe.log import Log

WITHOUT = """
import sys
from casemate.observe.log import Log
log = Log("casemate.x")
log.debug("a")
log.info("b", extra={"op": "y"})
print("logging" in sys.modules)
log.warning("told now", extra={"op": "y"})
"""


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_log_when_logging_is_set_up_then_each_level_comes_with_its_values_and_its_place(
    level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    cause = ValueError("cause")

    getattr(Log("casemate.x"), level)("made it", extra={"op": "x.make"}, exc_info=cause)

    (record,) = caplog.records
    assert (record.levelname, record.name, record.getMessage()) == (level.upper(), "casemate.x", "made it")
    assert record.__dict__["op"] == "x.make"
    assert record.exc_info is not None and record.exc_info[1] is cause
    assert record.filename == "test_log.py"


def test_log_when_nobody_imported_logging_then_only_a_warning_does_and_is_seen() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == ("False\n", "told now\n")
