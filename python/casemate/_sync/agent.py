# Made by scripts/unasync.py from python/casemate/_async/agent.py; do not edit.
"""The guest agent as the rest of the package calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from casemate._compat import blocking as compat
from casemate.agent import messages
from casemate.errors import AgentConnectionError, AgentRpcError, CasemateError

__all__ = ["AgentClient", "Answered", "Pending", "Pipeline"]

T = TypeVar("T")

SERVICE = "grpc.AgentService"
HEALTH = "grpc.Health"
DEVICE_SERVICE = "casemate.DeviceService"

Explain = Callable[[AgentConnectionError], compat.Later[CasemateError]]
"""Finds the cause of a broken connection: most often the end of the VMM."""


class Unsent:
    """In place of a reply: the request could not be sent."""

    __slots__ = ("error",)

    def __init__(self, error: AgentConnectionError) -> None:
        self.error = error

    def result(self) -> bytes:
        """Raises: why."""
        raise self.error

    def cancel(self) -> None:
        """There is nothing to forget."""


class Pending:
    """A request under way."""

    __slots__ = ("_explain", "reply")

    def __init__(self, reply: compat.Reply | Unsent, explain: Explain) -> None:
        self.reply = reply
        self._explain = explain

    def result(self) -> bytes:
        """The answer's document or bytes, once. Blocks: until it came, its deadline passed or the VMM ended.

        Raises:
            AgentRpcError: The agent refused.
            DeadlineExceededError: The deadline passed.
            VmmExitedError: The VMM ended, with its cause.
            AgentConnectionError: The connection broke and the VMM lives.
        """
        try:
            return self.reply.result()
        except AgentConnectionError as error:
            cause = self._explain(error)
            if cause is error:
                raise
            raise cause from error

    def cancel(self) -> None:
        """Forget the request."""
        self.reply.cancel()


class AgentClient:
    """Requests to one agent over one connection.

    Args:
        connection: The connection; owned.
        ordered: Whether the agent works off life-cycle requests in the order they came, so that they may be sent together.
        request_timeout_s: Deadline of a request that names none.
        explain: Finds the cause of a broken connection.
    """

    __slots__ = ("_explain", "_given_up", "connection", "ordered", "request_timeout_s")

    def __init__(
        self, connection: compat.AgentConnection, *, ordered: bool, request_timeout_s: float, explain: Explain
    ) -> None:
        self.connection = connection
        self.ordered = ordered
        self.request_timeout_s = request_timeout_s
        self._explain = explain
        self._given_up = ""

    @property
    def given_up(self) -> bool:
        """Whether :meth:`give_up` was called."""
        return bool(self._given_up)

    def give_up(self, text: str) -> None:
        """Count on the agent no more: what waits for it and what is sent later fails at once, with ``text``. Idempotent."""
        if not self._given_up:
            self._given_up = text
            self.connection.fail(text)

    def check_health(self, timeout_s: float) -> None:
        """Ask whether it serves. Raises and blocks as :meth:`Pending.result`."""
        self._send(lambda: self.connection.submit(HEALTH, "Check", b"{}", timeout_s)).result()

    def submit(
        self,
        method: str,
        message: messages.Message,
        *,
        timeout_s: float | None = None,
        service: str = SERVICE,
    ) -> Pending:
        """Send a request with the usual deadline or ``timeout_s``. Does not block."""
        limit = self.request_timeout_s if timeout_s is None else timeout_s
        return self._send(lambda: self.connection.submit(service, method, messages.encode(message), limit))

    def submit_unbounded(self, method: str, message: messages.Message) -> Pending:
        """Send a request that may take as long as it wants (a wait for a process). Does not block."""
        return self._send(lambda: self.connection.submit(SERVICE, method, messages.encode(message), None))

    def submit_read(self, container_id: str, exec_id: str, max_bytes: int, *, stderr: bool) -> Pending:
        """Ask for output of a process. Does not block."""
        return self._send(lambda: self.connection.submit_read(container_id, exec_id, max_bytes, stderr))

    def submit_write_stdin(self, container_id: str, exec_id: str, data: bytes) -> Pending:
        """Send input to a process; the answer waits as long as the process does not read. Does not block."""
        return self._send(lambda: self.connection.submit_write_stdin(container_id, exec_id, data, None))

    def call(self, method: str, message: messages.Message, *, timeout_s: float | None = None) -> bytes:
        """Send a request and wait for its answer. Raises and blocks as :meth:`Pending.result`."""
        limit = self.request_timeout_s if timeout_s is None else timeout_s
        try:
            return self.connection.call(SERVICE, method, messages.encode(message), limit)
        except AgentConnectionError as error:
            cause = self._explain(error)
            if cause is error:
                raise
            raise cause from error

    def ask(
        self, method: str, message: messages.Message, kind: type[T], *, timeout_s: float | None = None
    ) -> T:
        """As :meth:`call`, with the answer decoded."""
        return messages.decode(self.call(method, message, timeout_s=timeout_s), kind)

    def wait_any(
        self, pending: list[Pending], timeout_s: float | None = None
    ) -> list[Pending]:
        """Those whose result is there, at least one; empty at ``timeout_s``."""
        unsent = [one for one in pending if isinstance(one.reply, Unsent)]
        if unsent:
            return unsent
        replies = [one.reply for one in pending if not isinstance(one.reply, Unsent)]
        done = self.connection.wait_any(replies, timeout_s)
        return [one for one in pending if one.reply in done]

    def close(self) -> None:
        """Close the connection; what waits ends with AgentConnectionError. Idempotent."""
        self.connection.close()

    def _send(self, submit: Callable[[], compat.Reply]) -> Pending:
        # A connection that broke is found out by whoever sends next; why is told to whoever waits for the answer.
        try:
            return Pending(submit(), self._find_cause)
        except AgentConnectionError as error:
            return Pending(Unsent(error), self._find_cause)

    def _find_cause(self, error: AgentConnectionError) -> CasemateError:
        # Whoever was given up is not asked about any more, and its VMM not waited for.
        return AgentConnectionError(self._given_up) if self._given_up else self._explain(error)


class Answered:
    """A request whose outcome is known."""

    __slots__ = ("_answer", "_error")

    def __init__(self, answer: bytes, error: AgentRpcError | None) -> None:
        self._answer = answer
        self._error = error

    def result(self) -> bytes:
        """The answer. Raises: what the agent refused with."""
        if self._error is not None:
            raise self._error
        return self._answer


class Pipeline:
    """Life-cycle requests that build on each other: sent together where the agent keeps their order, else one by one."""

    __slots__ = ("agent",)

    def __init__(self, agent: AgentClient) -> None:
        self.agent = agent

    def send(self, method: str, message: messages.Message) -> Pending | Answered:
        """Send a request; its outcome, also a refusal, is in the result. Blocks: only where the agent keeps no order."""
        pending = self.agent.submit(method, message)
        if self.agent.ordered:
            return pending
        try:
            return Answered(pending.result(), None)
        except AgentRpcError as error:
            return Answered(b"", error)
