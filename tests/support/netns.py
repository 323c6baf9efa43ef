"""A network namespace of a test's own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["links", "network_namespace"]

CLONE_NEWNET = 0x40000000


@contextmanager
def network_namespace() -> Iterator[str]:
    """An empty network namespace without a name, as the path of an open descriptor; it goes with the descriptor."""
    fds: list[int] = []

    def make() -> None:
        # A thread's namespaces are its own: this one ends, the others never leave theirs.
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        fds.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (fd,) = fds
    try:
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)


def links(namespace: str) -> dict[str, dict[str, Any]]:
    """What ``ip`` shows in the namespace, by name, the loopback left out."""
    command = ["nsenter", f"--net={namespace}", "ip", "-json", "-details", "-statistics", "link"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {link["ifname"]: link for link in shown if link["ifname"] != "lo"}
