from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _no_log_records(caplog: pytest.LogCaptureFixture) -> None:
    """A kept record holds its error, that holds its frames, and those hold what was made."""
    caplog.set_level(logging.CRITICAL, logger="casemate")
