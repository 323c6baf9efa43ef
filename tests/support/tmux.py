"""A terminal that is real to the program in it: a pane of a tmux server of this test alone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Pane"]

_LOOK_S = 0.05


class Pane:
    """One pane with a shell in it."""

    def __init__(self, directory: Path, *, columns: int, rows: int, wait_s: float) -> None:
        self._socket = directory / "tmux.sock"
        self._wait_s = wait_s
        size = ["-x", str(columns), "-y", str(rows)]
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, "exec bash --norc --noprofile")
        self._tmux("set-option", "-g", "history-limit", "5000")

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self._socket, *words], capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, line: str) -> None:
        """Type a line and Enter."""
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def press(self, key: str) -> None:
        """Press a key, as ``C-c``."""
        self._tmux("send-keys", key)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def text(self) -> str:
        """What stands in it, with what was scrolled out."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def wait_for(self, wanted: str | Callable[[str], bool]) -> str:
        """Wait until ``wanted`` stands in it, a text or what a function says; return all that does."""
        deadline = time.monotonic() + self._wait_s
        # tmux has no event for a text that comes.
        while True:
            text = self.text()
            if wanted in text if isinstance(wanted, str) else wanted(text):
                return text
            assert time.monotonic() < deadline, f"{wanted} did not come; there is:\n{text}"
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """End the server and what runs in it."""
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True, timeout=20)
