"""The link to the guest: from a started VMM to an agent that answers."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from casemate import _core
from casemate._async.agent import AsyncAgentClient
from casemate._compat import aio as compat
from casemate.agent.transport import AGENT_PORT, HybridTransport, Transport, VsockTransport
from casemate.errors import (
    AgentConnectionError,
    CasemateError,
    DeadlineExceededError,
    InternalError,
    VmmExitedError,
)
from casemate.observe.log import Log

if TYPE_CHECKING:
    from _typeshed import HasFileno

    from casemate.keeper.vmm import KeptVmm

__all__ = ["AsyncVmm", "await_agent", "dial_agent"]

_log = Log(__name__)


class AsyncVmm(Protocol):
    """The VMM as the link needs it: a process to watch, and the cause of its end."""

    @property
    def process(self) -> _core.ChildProcess | KeptVmm:
        """Its process."""

    async def exit_error(self, wait_s: float = 1.0) -> VmmExitedError | None:
        """Why it ended; None when it has not within ``wait_s``."""


EXIT_GRACE_S = 2.0
"""A broken connection is mostly the first sign of the VMM's end; so long its exit status is waited for."""


async def await_agent(
    driver: AsyncVmm,
    transport: Transport,
    listener: socket.socket,
    *,
    timeout_s: float,
    request_timeout_s: float,
) -> AsyncAgentClient:
    """Wait until the agent calls the host, return a client on that very connection.

    Raises:
        VmmExitedError: The VMM ended first, with the cause.
        DeadlineExceededError: No call came in ``timeout_s`` seconds; the text has the console's tail.

    Blocks: until then. No polling: the call wakes it.
    """
    started = time.monotonic()
    child = driver.process
    while True:
        ready = await compat.wait_readable((listener.fileno(), child.fileno()), started + timeout_s)
        if child.fileno() in ready and listener.fileno() not in ready:
            raise await _exit_cause(driver)
        if not ready:
            raise await _boot_too_slow(driver, started, timeout_s)
        accepted, address = listener.accept()
        if transport.is_guest(address):
            break
        _log.warning(
            "a stranger called in place of the agent", extra={"op": "sandbox.boot", "target": str(address)}
        )
        accepted.close()
    return _client(driver, accepted.detach(), ordered=True, request_timeout_s=request_timeout_s)


async def dial_agent(
    transport: Transport, driver: AsyncVmm | None, *, timeout_s: float, request_timeout_s: float
) -> AsyncAgentClient:
    """Connect to the agent's port: for an agent that does not call, or a sandbox that another process owns.

    Raises and blocks as :meth:`await_agent`; refusals are retried every 1 to 5 ms until the deadline.
    """
    watch = driver.process if driver is not None else None
    dial = _dialler(transport, timeout_s, watch)
    started = time.monotonic()
    try:
        fd = await _dialled(dial)
    except AgentConnectionError as error:
        if driver is None:
            raise
        raise await explain(driver, error) from error
    except DeadlineExceededError as error:
        if driver is None:
            raise
        raise await _boot_too_slow(driver, started, timeout_s) from error
    return _client(driver, fd, ordered=False, request_timeout_s=request_timeout_s)


async def _dialled(dial: Callable[[], int]) -> int:
    """Run ``dial`` in a thread. When the wait is given up, its socket is closed, now or when it comes."""
    made: list[int] = []
    given_up = False
    lock = threading.Lock()

    def run() -> int:
        fd = dial()
        with lock:
            if given_up:
                os.close(fd)
            else:
                made.append(fd)
        return fd

    try:
        return await compat.to_thread(run)
    except BaseException:
        with lock:
            given_up = True
            for fd in made:
                os.close(fd)
        raise


def _dialler(transport: Transport, timeout_s: float, watch: HasFileno | None) -> functools.partial[int]:
    if isinstance(transport, HybridTransport):
        return functools.partial(
            _core.connect_hybrid, str(transport.path), AGENT_PORT, timeout_s=timeout_s, watch=watch
        )
    assert isinstance(transport, VsockTransport)
    return functools.partial(_core.connect_vsock, transport.cid, AGENT_PORT, timeout_s=timeout_s, watch=watch)


def _client(
    driver: AsyncVmm | None, take_fd: int, *, ordered: bool, request_timeout_s: float
) -> AsyncAgentClient:
    watch = driver.process if driver is not None else None
    connection = compat.AgentConnection(take_fd, watch=watch)
    return AsyncAgentClient(
        connection,
        ordered=ordered,
        request_timeout_s=request_timeout_s,
        explain=functools.partial(explain, driver),
    )


async def explain(driver: AsyncVmm | None, error: AgentConnectionError) -> CasemateError:
    """The cause of a broken connection: VmmExitedError when the VMM ended, else ``error``."""
    if driver is None:
        return error
    ended = await driver.exit_error(EXIT_GRACE_S)
    return error if ended is None else ended


async def _exit_cause(driver: AsyncVmm) -> CasemateError:
    ended = await driver.exit_error()
    return InternalError("the VMM's end was seen but its status is unknown") if ended is None else ended


async def _boot_too_slow(driver: AsyncVmm, started: float, timeout_s: float) -> DeadlineExceededError:
    console = driver.process.console_tail().decode("utf-8", "replace").strip()
    tail = "\n".join(console.splitlines()[-12:])
    told = f"; the console's last lines:\n{tail}" if tail else "; the guest's console is empty"
    return DeadlineExceededError(
        f"the guest's agent did not answer within {timeout_s:.1f} s of the VMM's start{told}",
        deadline_s=timeout_s,
        waited_s=time.monotonic() - started,
        op="sandbox.boot",
    )
