# Made by scripts/unasync.py from python/casemate/_async/qmp.py; do not edit.
"""One QMP connection to one QEMU, for its whole life. Many may use it at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from casemate._compat import blocking as compat
from casemate.errors import DeadlineExceededError, HypervisorError, InvalidStateError, QmpError
from casemate.hypervisor.qemu import qmp
from casemate.observe.log import Log

__all__ = ["QmpClient", "QmpEvent"]

_log = Log(__name__)

Explain = Callable[[HypervisorError], Coroutine[Any, Any, Exception]]
"""Finds the cause of a broken connection: most often the end of QEMU."""


class QmpEvent:
    """An event awaited from now on, so that one that comes before the answer of its command is not missed."""

    __slots__ = ("_client", "_slot", "match", "names")

    def __init__(
        self, client: QmpClient, slot: compat.Slot, names: tuple[str, ...], match: Mapping[str, Any]
    ) -> None:
        self._client = client
        self._slot = slot
        self.names = names
        self.match = match

    def wait(self, timeout_s: float) -> qmp.Event:
        """The event. It is forgotten at the deadline.

        Raises:
            DeadlineExceededError: It did not come.
            VmmExitedError: QEMU ended.
        Blocks: until then.
        """
        try:
            event: qmp.Event = self._client._result(self._slot, time.monotonic() + timeout_s)
        except DeadlineExceededError as error:
            names = " or ".join(self.names)
            raise DeadlineExceededError(
                f"no event {names} with {dict(self.match)} came within {timeout_s:g} s",
                deadline_s=timeout_s,
                waited_s=error.waited_s,
                op="qmp.wait_event",
            ) from error
        finally:
            self.cancel()
        return event

    def cancel(self) -> None:
        """Await it no more. Idempotent."""
        self._client._forget_event(self)


class QmpClient:
    """Commands to QEMU and their answers, each with a deadline; the end of QEMU ends every wait at once.

    Args:
        take_socket: Connected to QEMU's listener, perhaps before QEMU runs; owned.
        explain: Finds the cause of a broken connection; called by each wait that the break ends.
    """

    __slots__ = (
        "_channel",
        "_ended",
        "_events",
        "_explain",
        "_greeting",
        "_late_total",
        "_protocol",
        "_replies",
    )

    def __init__(self, take_socket: socket.socket, *, explain: Explain) -> None:
        self._explain = explain
        self._protocol = qmp.QmpProtocol()
        self._replies: dict[int, compat.Slot] = {}
        self._events: list[tuple[QmpEvent, compat.Slot]] = []
        self._ended: HypervisorError | None = None
        self._late_total = 0
        self._greeting = compat.Slot()
        self._channel = compat.Channel(take_socket, self._received, self._end)

    @property
    def version(self) -> tuple[int, int, int] | None:
        """QEMU's version, None before :meth:`negotiate`."""
        return None if self._protocol.greeting is None else self._protocol.greeting.version

    @property
    def late_answers_total(self) -> int:
        """Answers that came after their deadline."""
        return self._late_total

    def negotiate(self, *, timeout_s: float) -> qmp.Greeting:
        """Await the greeting and leave the negotiation; ``oob`` is taken when offered.

        Raises:
            UnsupportedError: QEMU is older than version 5.
            VmmExitedError: QEMU ended, with its cause.
            DeadlineExceededError: It did not greet.
        Blocks: until then.
        """
        deadline = time.monotonic() + timeout_s
        greeting: qmp.Greeting = self._result(self._greeting, deadline)
        self._run([self._protocol.negotiation], ["qmp_capabilities"], deadline, ())
        return greeting

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        borrow_fds: Sequence[int] = (),
    ) -> Any:
        """Run ``command`` and return what QEMU returns.

        Args:
            borrow_fds: Descriptors that go with it (``getfd``, ``add-fd``).

        Raises:
            QmpError: QEMU refused it (``command``, ``error_class``).
            DeadlineExceededError: No answer; a late one is dropped and counted.
            VmmExitedError: QEMU ended, with its cause.
        Blocks: until the answer.
        """
        (outcome,) = self._run_commands([(command, arguments)], timeout_s, borrow_fds)
        if isinstance(outcome, QmpError):
            raise outcome
        return outcome

    def execute_many(
        self, commands: Sequence[tuple[str, Mapping[str, Any] | None]], *, timeout_s: float
    ) -> list[Any]:
        """Run independent commands sent in one write; a QmpError stands in the place of each that QEMU refused.

        Raises:
            DeadlineExceededError: Not all were answered; VmmExitedError.
        Blocks: until all answers.
        """
        return self._run_commands(commands, timeout_s, ())

    def expect(self, *names: str, match: Mapping[str, Any] | None = None) -> QmpEvent:
        """Await the first event from now on that has one of ``names`` and all of ``match`` in its data. Does not block."""
        slot = compat.Slot()
        event = QmpEvent(self, slot, names, match or {})
        self._events.append((event, slot))
        if self._ended is not None:
            slot.fail(self._ended)
        return event

    def wait_event(
        self, name: str, match: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> qmp.Event:
        """Await an event that is yet to come. Raises and blocks as :meth:`QmpEvent.wait`."""
        return self.expect(name, match=match).wait(timeout_s)

    def close(self) -> None:
        """End the connection; every wait ends with HypervisorError. Idempotent. Does not block."""
        self._channel.close()

    def _run_commands(
        self,
        commands: Sequence[tuple[str, Mapping[str, Any] | None]],
        timeout_s: float,
        borrow_fds: Sequence[int],
    ) -> list[Any]:
        makers = [_maker(self._protocol, command, arguments) for command, arguments in commands]
        names = [command for command, _ in commands]
        return self._run(makers, names, time.monotonic() + timeout_s, borrow_fds)

    def _run(
        self,
        makers: Sequence[Callable[[], tuple[int, bytes]]],
        names: Sequence[str],
        deadline: float,
        borrow_fds: Sequence[int],
    ) -> list[Any]:
        started = time.monotonic()
        slots: list[tuple[int, compat.Slot]] = []

        def make() -> bytes:
            if self._ended is not None:
                raise BrokenPipeError("the connection has ended")
            lines = []
            for maker in makers:
                number, line = maker()
                slot = compat.Slot()
                self._replies[number] = slot
                slots.append((number, slot))
                lines.append(line)
            return b"".join(lines)

        outcomes: list[Any] = []
        try:
            self._send(make, deadline, borrow_fds)
            for _, slot in slots:
                outcomes.append(self._result(slot, deadline))
            return outcomes
        except DeadlineExceededError as error:
            late = names[len(outcomes)]
            raise DeadlineExceededError(
                f"QEMU did not answer {late} within {deadline - started:.3g} s",
                deadline_s=deadline - started,
                waited_s=time.monotonic() - started,
                op=f"qmp.{late}",
            ) from error
        finally:
            for number, _ in slots:
                self._replies.pop(number, None)

    def _send(self, make: Callable[[], bytes], deadline: float, borrow_fds: Sequence[int]) -> None:
        try:
            self._channel.send(make, deadline, borrow_fds)
        except InvalidStateError:
            if self._ended is None:
                raise
            raise self._explain(self._ended) from self._ended
        except OSError as error:
            if isinstance(error, DeadlineExceededError):
                raise
            ended = self._ended or _broken(error)
            raise self._explain(ended) from ended

    def _result(self, slot: compat.Slot, deadline: float) -> Any:
        try:
            return self._channel.wait(slot, deadline)
        except HypervisorError as error:
            if error is not self._ended:
                raise
            raise self._explain(error) from error

    def _forget_event(self, event: QmpEvent) -> None:
        self._events = [entry for entry in self._events if entry[0] is not event]

    def _received(self, data: bytes) -> None:
        for message in self._protocol.feed(data):
            if isinstance(message, qmp.Reply):
                slot = self._replies.pop(message.id, None)
                if slot is None:
                    self._late_total += 1
                else:
                    slot.resolve(message.error if message.error is not None else message.value)
            elif isinstance(message, qmp.Event):
                self._dispatch(message)
            else:
                self._greeting.resolve(message)

    def _dispatch(self, event: qmp.Event) -> None:
        _log.debug("QEMU event", extra={"op": "qmp.event", "target": event.name})
        for awaited, slot in self._events:
            if event.name in awaited.names and qmp.matches(event.data, awaited.match):
                slot.resolve(event)

    def _end(self, error: BaseException | None) -> None:
        self._ended = _broken(error)
        # A refused version is its own cause; every other end is QEMU's.
        for slot in [self._greeting, *self._replies.values(), *(slot for _, slot in self._events)]:
            slot.fail(self._ended if isinstance(error, (HypervisorError, OSError, type(None))) else error)


def _maker(
    protocol: qmp.QmpProtocol, command: str, arguments: Mapping[str, Any] | None
) -> Callable[[], tuple[int, bytes]]:
    return lambda: protocol.encode(command, arguments)


def _broken(error: BaseException | None) -> HypervisorError:
    if isinstance(error, HypervisorError):
        return error
    if error is None:
        return HypervisorError("QEMU closed the QMP connection")
    broken = HypervisorError(f"the QMP connection broke: {error}")
    broken.__cause__ = error
    return broken
