"""The lab: a virtual machine with hardware virtualisation of its own, for tests of what the host does not have.

``python -m tests.lab`` is its command line, ``docs/lab.md`` its manual. The tests that are made for it lie here as well.
"""

from __future__ import annotations

__all__ = ["LabError"]


class LabError(Exception):
    """The lab can't be had, or did not do its work; the text says why and what helps."""
