"""The watch over one sandbox: the VMM's end, an agent that does not answer, what the console tells. It waits, it does not poll.

It starts with the first who wants to know, runs beside the caller (a task, or a thread in the blocking face) and ends with the
sandbox. A round of asking is one command to the VMM and one request to the agent every ``interval_s`` seconds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from casemate import _core
from casemate._compat import aio as compat
from casemate.errors import AgentError, CasemateError, DeadlineExceededError, HypervisorError, VmmExitedError
from casemate.observe.console import ConsoleLines
from casemate.observe.log import Log
from casemate.types import Event, EventKind

if TYPE_CHECKING:
    from casemate._async.agent import AsyncAgentClient
    from casemate._async.hypervisor import AsyncHypervisor
    from casemate.config.monitor import MonitorConfig

__all__ = ["AsyncEvents", "AsyncMonitor"]

_log = Log(__name__)

CAPACITY = 128
_EXIT_GRACE_S = 2.0
_PANIC = "Kernel panic - not syncing"


class AsyncEvents:
    """What happens to a sandbox, as it comes; ends when the sandbox is stopped or its VMM has ended. One reader.

    Attributes:
        dropped_total: Events that found 128 others unread and were dropped.
    """

    __slots__ = ("_leave", "_mailbox", "dropped_total")

    def __init__(self, leave: Callable[[AsyncEvents], None]) -> None:
        self._leave = leave
        self._mailbox: compat.Mailbox[Event] = compat.Mailbox(CAPACITY)
        self.dropped_total = 0

    def put(self, event: Event) -> None:
        """Hand it over, or drop it. Does not wait."""
        if not self._mailbox.put(event):
            self.dropped_total += 1

    def end(self) -> None:
        """Nothing more will come."""
        self._mailbox.close()

    def __aiter__(self) -> AsyncEvents:
        return self

    async def __anext__(self) -> Event:
        event = await self._mailbox.get()
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """Want no more. Idempotent."""
        self._leave(self)
        self.end()

    async def __aenter__(self) -> AsyncEvents:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncMonitor:
    """The watch.

    Args:
        sandbox_id: For the events.
        driver: The VMM. agent: Its agent; given up when it does not answer.
        config: How often and how patient.
        timeout_factor: For ``config.timeout_s``.
        is_paused: Whether the guest can't answer because it stands.
    """

    __slots__ = (
        "_agent",
        "_callbacks",
        "_config",
        "_console",
        "_console_position",
        "_driver",
        "_failures",
        "_is_paused",
        "_lock",
        "_panicked",
        "_readers",
        "_sandbox_id",
        "_stopping",
        "_timeout_s",
        "_wake_fd",
        "_work",
    )

    def __init__(
        self,
        sandbox_id: str,
        driver: AsyncHypervisor,
        agent: AsyncAgentClient,
        config: MonitorConfig,
        *,
        timeout_factor: float,
        is_paused: Callable[[], bool],
    ) -> None:
        self._sandbox_id = sandbox_id
        self._driver = driver
        self._agent = agent
        self._config = config
        self._timeout_s = config.timeout_s * timeout_factor
        self._is_paused = is_paused
        self._lock = threading.Lock()
        self._readers: list[AsyncEvents] = []
        self._callbacks: list[Callable[[Event], None]] = []
        self._console = ConsoleLines()
        self._console_position = 0
        self._failures = 0
        self._panicked = False
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._work = compat.Background(self._run, "casemate-monitor")

    def subscribe(self) -> AsyncEvents:
        """Events from now on. Does not block."""
        reader = AsyncEvents(self._leave)
        with self._lock:
            if self._stopping:
                reader.end()
            else:
                self._readers.append(reader)
        return reader

    def call(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` with each event from now on; what is returned ends that. Does not block."""
        with self._lock:
            self._callbacks.append(callback)

        def cancel() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return cancel

    def request_stop(self) -> None:
        """End at the next occasion; what it waits for ends with the VMM's connections. Idempotent. Does not block."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                os.eventfd_write(self._wake_fd, 1)

    async def join(self) -> None:
        """Wait for its end after :meth:`request_stop`, and tell every reader. Idempotent. Blocks: until then."""
        # A callback that stops the sandbox can't wait for itself.
        if not self._work.is_own():
            await self._work.join()

    async def _run(self) -> None:
        vmm_fd = self._driver.process.fileno()
        try:
            while not self._stopping:
                ready = await compat.wait_readable(
                    (vmm_fd, self._wake_fd), time.monotonic() + self._config.interval_s
                )
                self._read_console()
                if vmm_fd in ready:
                    await self._tell_end()
                    return
                if not ready and not self._agent.given_up:
                    await self._ask()
        finally:
            with self._lock:
                self._stopping = True
                readers, self._readers = self._readers, []
                os.close(self._wake_fd)
            for reader in readers:
                reader.end()

    async def _ask(self) -> None:
        if self._is_paused():
            self._failures = 0
            return
        side = "VMM"
        try:
            await self._driver.check(self._timeout_s)
            side = "agent"
            await self._agent.check_health(self._timeout_s)
        except VmmExitedError:
            return  # its pidfd tells
        except (HypervisorError, AgentError, DeadlineExceededError) as error:
            if not self._stopping:
                self._failed(side, error)
            return
        self._failures = 0

    def _failed(self, side: str, error: CasemateError) -> None:
        self._failures += 1
        count = f"{self._failures} of {self._config.failures}"
        self._publish(
            EventKind.UNHEALTHY, f"the {side} does not answer as it should ({count}): {error}", error
        )
        if self._failures >= self._config.failures:
            text = f"the agent of sandbox {self._sandbox_id} was given up: {error}"
            self._agent.give_up(text)
            self._publish(EventKind.AGENT_DEAD, text, error)

    async def _tell_end(self) -> None:
        error = await self._driver.exit_error(_EXIT_GRACE_S)
        # The rest of the console comes with the end.
        self._read_console()
        for line in self._console.end():
            self._tell_line(line)
        if not self._stopping:
            self._publish(EventKind.VMM_EXITED, "the VMM ended" if error is None else str(error), error)

    def _read_console(self) -> None:
        process = self._driver.process
        # A VMM that belongs to a keeper is not watched from here.
        assert isinstance(process, _core.ChildProcess)
        data, self._console_position = process.console_since(self._console_position)
        for line in self._console.feed(data):
            self._tell_line(line)

    def _tell_line(self, line: str) -> None:
        _log.debug("console", extra={"sandbox": self._sandbox_id, "op": "sandbox.console", "line": line})
        _, found, reason = line.partition(_PANIC)
        if found and not self._panicked:
            self._panicked = True
            text = f"the guest kernel panicked: {reason.removeprefix(':').strip() or 'no reason given'}"
            self._publish(EventKind.GUEST_PANICKED, text, None)

    def _publish(self, kind: EventKind, text: str, error: CasemateError | None) -> None:
        event = Event(kind=kind, sandbox_id=self._sandbox_id, text=text, error=error)
        _log.warning(text, extra={"sandbox": self._sandbox_id, "op": f"sandbox.{kind.value}"})
        with self._lock:
            readers, callbacks = tuple(self._readers), tuple(self._callbacks)
        for reader in readers:
            reader.put(event)
        for callback in callbacks:
            try:
                callback(event)
            except Exception as failure:
                _log.warning("a callback for events failed", extra={"op": "sandbox.event"}, exc_info=failure)

    def _leave(self, reader: AsyncEvents) -> None:
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)
