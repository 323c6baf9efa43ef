"""A VMM that is a fake: a process that takes QEMU's place, with a fake agent in place of a guest.

It speaks what its callers speak to the real ones (QEMU's command line and QMP, the agent's protocol on a socket), written by
hand and from the standard library alone, so it shares nothing with the client that is tested on it. Importing this package
brings nothing in; the program is ``vmm.py``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["command"]


def command() -> tuple[str, ...]:
    """The words that start the fake VMM; its arguments follow. Does not block."""
    import sys

    # Without site and by its own folder: a start costs a third of what the whole package's import would.
    here = Path(__file__).resolve().parent
    start = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); from fake.vmm import main; main(sys.argv[1:])"
    )
    return (sys.executable, "-E", "-S", "-c", start)
