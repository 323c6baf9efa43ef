# Made by scripts/unasync.py from python/casemate/_async/process.py; do not edit.
"""A process in a container: its streams, its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from casemate._sync.agent import AgentClient, Pending
from casemate._compat import blocking as compat
from casemate.agent import messages
from casemate.errors import AgentRpcError, DeadlineExceededError, InvalidStateError, ResourceExhaustedError
from casemate.observe import failpoints

if TYPE_CHECKING:
    from casemate.types import ContainerId, ExecId

__all__ = ["Process", "Reader", "Writer"]

READ_BYTES = 256 * 1024
WRITE_BYTES = 64 * 1024
CAPTURE_LIMIT_BYTES = 256 << 20
NO_SUCH_PROCESS = "ESRCH: No such process"


class Reader:
    """Output of a process. One reader at a time."""

    __slots__ = (
        "_agent",
        "_at_end",
        "_container_id",
        "_exec_id",
        "_held",
        "_kept",
        "_pending",
        "_stderr",
        "first_ns",
    )

    def __init__(
        self, agent: AgentClient, container_id: str, exec_id: str, *, stderr: bool, kept: bool = False
    ) -> None:
        self._agent = agent
        self._kept = kept
        self._container_id = container_id
        self._exec_id = exec_id
        self._stderr = stderr
        self._pending: Pending | None = None
        self._held = b""
        self._at_end = False
        self.first_ns: int | None = None
        """When the first byte came, of ``time.perf_counter_ns()``."""

    def prefetch(self) -> Pending:
        """Ask for the next piece unless that is under way. Does not block.

        Raises: InvalidStateError: The keeper of a detached sandbox reads it already.
        """
        if self._kept:
            raise InvalidStateError(
                f"the output of container {self._container_id} is taken down by the sandbox's keeper: "
                "read it with Sandbox.logs() or `casemate logs`",
                state="kept",
                wanted="owned",
                op="process.read",
                container_id=self._container_id,
            )
        if self._pending is None:
            failpoints.hit("agent.read")
            self._pending = self._agent.submit_read(
                self._container_id, self._exec_id, READ_BYTES, stderr=self._stderr
            )
        return self._pending

    def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """At most ``max_bytes`` bytes, at least one; empty at the end. Blocks: until the process writes or ends.

        Raises:
            VmmExitedError: The VMM ended.
            AgentRpcError: The process is unknown.
        """
        if not self._held and not self._at_end:
            self._held = self.take()
        piece, self._held = self._held[:max_bytes], self._held[max_bytes:]
        return piece

    def take(self) -> bytes:
        """The next piece as it came; empty at the end."""
        if self._at_end:
            return b""
        try:
            piece = self.prefetch().result()
        finally:
            self._pending = None
        self._at_end = not piece
        if self.first_ns is None and piece:
            self.first_ns = time.perf_counter_ns()
        return piece

    def read_all(self, limit_bytes: int = CAPTURE_LIMIT_BYTES) -> bytes:
        """Everything until the end. Blocks: until then.

        Raises:
            ResourceExhaustedError: More than ``limit_bytes`` bytes came.
        """
        pieces: list[bytes] = []
        held_bytes = 0
        while piece := self.read():
            pieces.append(piece)
            held_bytes += len(piece)
            _check_limit(held_bytes, limit_bytes)
        return b"".join(pieces)

    def __iter__(self) -> Iterator[bytes]:
        """Pieces as they come."""
        while piece := self.read():
            yield piece

    @property
    def at_end(self) -> bool:
        """Whether everything has been read."""
        return self._at_end and not self._held


class Writer:
    """Input of a process."""

    __slots__ = ("_agent", "_closed", "_container_id", "_exec_id")

    def __init__(self, agent: AgentClient, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._container_id = container_id
        self._exec_id = exec_id
        self._closed = False

    def write(self, data: bytes) -> None:
        """Write everything. Blocks: as long as the process does not read.

        Raises:
            InvalidStateError: The stream was closed.
            AgentRpcError: The process ended or closed its input.
        """
        for start in range(0, len(data), WRITE_BYTES):
            self.submit(data[start : start + WRITE_BYTES]).result()

    def submit(self, piece: bytes) -> Pending:
        """Send one piece of at most 64 KiB. Does not block."""
        if self._closed:
            raise InvalidStateError(
                "the standard input was closed", state="closed", wanted="open", op="stdin.write"
            )
        failpoints.hit("agent.write_stdin")
        return self._agent.submit_write_stdin(self._container_id, self._exec_id, piece)

    def close(self) -> None:
        """Close it: the process reads end of file. Idempotent."""
        if not self._closed:
            self.submit_close().result()

    def submit_close(self) -> Pending:
        """Send the request that closes it. Does not block."""
        failpoints.hit("agent.close_stdin")
        self._closed = True
        return self._agent.submit(
            "CloseStdin", messages.CloseStdinRequest(container_id=self._container_id, exec_id=self._exec_id)
        )


class Process:
    """A process in a container. Made by ``exec`` or, for the first one, by the container.

    Attributes:
        container_id: Its container.
        exec_id: Its name in the container; the container's own for the first process.
        terminal: Whether it has a terminal; then ``stdout`` carries everything and ``stderr`` is None.
        stdin: Its input. stdout, stderr: Its output.
    """

    __slots__ = (
        "_agent",
        "_exit_code",
        "_lock",
        "_settling",
        "_wait",
        "container_id",
        "exec_id",
        "stderr",
        "stdin",
        "stdout",
        "terminal",
    )

    def __init__(
        self,
        agent: AgentClient,
        container_id: ContainerId,
        exec_id: ExecId,
        *,
        terminal: bool,
        exit_code: int | None = None,
        kept: bool = False,
    ) -> None:
        self._agent = agent
        self.container_id = container_id
        self.exec_id = exec_id
        self.terminal = terminal
        self.stdin = Writer(agent, container_id, exec_id)
        self.stdout = Reader(agent, container_id, exec_id, stderr=False, kept=kept)
        self.stderr = None if terminal else Reader(agent, container_id, exec_id, stderr=True, kept=kept)
        self._exit_code = exit_code
        self._wait: Pending | None = None
        self._lock = threading.Lock()
        self._settling = compat.Lock()

    @property
    def exit_code(self) -> int | None:
        """Its exit status if a wait has seen it; 128 + n for signal n."""
        return self._exit_code

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end, return its exit status, 128 + n when signal n ended it. Several may wait.

        Raises:
            DeadlineExceededError: It still runs after ``timeout_s`` seconds.
            VmmExitedError: The VMM ended first.
        """
        started = time.monotonic()
        if self._exit_code is None:
            pending = self.submit_wait()
            if not self._agent.wait_any([pending], timeout_s):
                waited_s = time.monotonic() - started
                raise DeadlineExceededError(
                    f"process {self.exec_id} still runs after {waited_s:.1f} s",
                    deadline_s=timeout_s or 0.0,
                    waited_s=waited_s,
                    op="process.wait",
                    container_id=self.container_id,
                )
            if self._exit_code is None:
                self._settle(pending)
        assert self._exit_code is not None
        return self._exit_code

    def submit_wait(self) -> Pending:
        """Ask for the end unless that is under way. Does not block."""
        with self._lock:
            if self._wait is None:
                failpoints.hit("agent.wait_process")
                request = messages.WaitProcessRequest(container_id=self.container_id, exec_id=self.exec_id)
                self._wait = self._agent.submit_unbounded("WaitProcess", request)
            return self._wait

    def _settle(self, pending: Pending) -> None:
        # The answer is there: taking it does not wait. Whoever comes second finds the status.
        with self._settling:
            if self._exit_code is not None:
                return
            try:
                answer = pending.result()
            except BaseException:
                self._wait = None
                raise
            self._exit_code = messages.decode(answer, messages.WaitProcessResponse).status

    def abandon(self) -> None:
        """Kill it, if it was ever started, without waiting for the answer: its caller was interrupted. Does not block."""
        if not self._agent.connection.closed and self._exit_code is None:
            request = messages.SignalProcessRequest(
                container_id=self.container_id, exec_id=self.exec_id, signal=int(signal.SIGKILL)
            )
            self._agent.submit("SignalProcess", request).cancel()

    def signal(self, number: int) -> None:
        """Send signal ``number`` to it; one that has ended is left alone. Blocks: for the agent's answer."""
        request = messages.SignalProcessRequest(
            container_id=self.container_id, exec_id=self.exec_id, signal=int(number)
        )
        failpoints.hit("agent.signal")
        try:
            self._agent.call("SignalProcess", request)
        except AgentRpcError as error:
            if NO_SUCH_PROCESS not in error.details and self._exit_code is None:
                raise

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal in characters. Raises: AgentRpcError without a terminal."""
        request = messages.TtyWinResizeRequest(
            container_id=self.container_id, exec_id=self.exec_id, row=rows, column=columns
        )
        failpoints.hit("agent.resize")
        self._agent.call("TtyWinResize", request)

    def wait_output(self, readers: Sequence[Reader]) -> list[Reader]:
        """Those of its ``readers`` whose next piece is there (or whose end is), at least one. Blocks: until then."""
        pending = {id(reader.prefetch()): reader for reader in readers}
        done = self._agent.wait_any([reader.prefetch() for reader in readers])
        return [pending[id(one)] for one in done]

    def communicate(
        self,
        data: bytes | None = None,
        *,
        timeout_s: float | None = None,
        limit_bytes: int = CAPTURE_LIMIT_BYTES,
    ) -> tuple[bytes, bytes]:
        """Write ``data`` to its input and close it, read both outputs to their end, wait for its end.

        Args:
            data: Its whole input; None: an empty one.
            timeout_s: Seconds until DeadlineExceededError; the process goes on then.
            limit_bytes: Most bytes of both outputs together.

        Returns: What came on stdout and stderr.
        Raises: DeadlineExceededError, ResourceExhaustedError (more output than ``limit_bytes``), VmmExitedError.
        """
        started = time.monotonic()
        outputs: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        readers = {"stdout": self.stdout} | ({"stderr": self.stderr} if self.stderr is not None else {})
        pending: dict[str, Pending] = {name: reader.prefetch() for name, reader in readers.items()}
        unsent = memoryview(data or b"")
        pending["stdin"] = (
            self.stdin.submit(bytes(unsent[:WRITE_BYTES])) if unsent else self.stdin.submit_close()
        )
        held_bytes = 0
        while pending:
            left_s = None if timeout_s is None else max(started + timeout_s - time.monotonic(), 0.0)
            done = self._agent.wait_any(list(pending.values()), left_s)
            if not done:
                raise DeadlineExceededError(
                    f"process {self.exec_id} still has open streams after {timeout_s} s",
                    deadline_s=timeout_s or 0.0,
                    waited_s=time.monotonic() - started,
                    op="process.communicate",
                    container_id=self.container_id,
                )
            for name in [name for name, one in pending.items() if one in done]:
                if name == "stdin":
                    one = pending.pop(name)
                    rest = self._sent(one, unsent)
                    if rest is not None:
                        unsent = rest
                        pending[name] = (
                            self.stdin.submit(bytes(unsent[:WRITE_BYTES]))
                            if unsent
                            else self.stdin.submit_close()
                        )
                    continue
                piece = readers[name].take()
                if piece:
                    outputs[name].append(piece)
                    held_bytes += len(piece)
                    _check_limit(held_bytes, limit_bytes)
                    pending[name] = readers[name].prefetch()
                else:
                    del pending[name]
        left_s = None if timeout_s is None else max(started + timeout_s - time.monotonic(), 0.0)
        self.wait(left_s)
        return b"".join(outputs["stdout"]), b"".join(outputs["stderr"])

    def _sent(self, one: Pending, unsent: memoryview) -> memoryview | None:
        """What is left of the input after a write was answered; None when input is over."""
        try:
            one.result()
        except AgentRpcError:
            # It ended or closed its input: nobody reads the rest, which is no failure of the call.
            return None
        if self.stdin._closed:
            return None
        return unsent[WRITE_BYTES:]


def _check_limit(held_bytes: int, limit_bytes: int) -> None:
    if held_bytes > limit_bytes:
        raise ResourceExhaustedError(
            f"the process wrote more than {limit_bytes} bytes; read its streams piece by piece, or raise limit_bytes"
        )
