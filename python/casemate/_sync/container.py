# Made by scripts/unasync.py from python/casemate/_async/container.py; do not edit.
"""A container in a sandbox: its life, its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

from casemate._sync.agent import AgentClient, Answered, Pending, Pipeline
from casemate._sync.process import CAPTURE_LIMIT_BYTES, Process
from casemate._compat import blocking as compat
from casemate.agent import messages
from casemate.agent.failure import command_error
from casemate.errors import AgentRpcError, CommandError, InvalidStateError
from casemate.observe import failpoints
from casemate.persist.record import ContainerRecord
from casemate.types import ContainerId, ExecId, ExecResult, State, check_identifier, check_transition

if TYPE_CHECKING:
    from casemate.images import Image

__all__ = ["Container", "Changed", "Detach", "captured", "new_container_id"]

# Lets go of a container's disk.
Detach = Callable[[], compat.Later[None]]
# Is told that a container's state has changed.
Changed = Callable[[], compat.Later[None]]


def _nothing() -> None:
    """Nobody wants to know of changes: the sandbox is another process's."""


class Container:
    """A container in a sandbox. Made by ``create_container``.

    Attributes:
        id: Its name in the sandbox.
        image_name: The reference its root file system was made from.
        image_digest: The digest of that image.
        process: Its first process, with the streams.
    """

    __slots__ = (
        "_agent",
        "_changed",
        "_created_unix_ns",
        "_creating",
        "_detach",
        "_gone",
        "_image",
        "_starting",
        "_state",
        "id",
        "image_digest",
        "image_name",
        "process",
        "process_spec",
    )

    def __init__(
        self,
        agent: AgentClient,
        record: ContainerRecord,
        *,
        image: Image | None,
        changed: Changed = _nothing,
        detach: Detach | None = None,
        kept: bool = False,
    ) -> None:
        self._agent = agent
        self._changed = changed
        self._created_unix_ns = record.created_unix_ns
        self._creating: Pending | Answered | None = None
        self._detach = detach
        self._gone = False
        self._image = image
        self._starting: Pending | Answered | None = None
        self._state = record.state
        self.id = ContainerId(record.id)
        self.image_name = record.image
        self.image_digest = record.image_digest
        self.process_spec = record.process
        self.process = Process(
            agent,
            self.id,
            ExecId(record.id),
            terminal=record.process.terminal,
            exit_code=record.exit_code,
            kept=kept,
        )

    @property
    def state(self) -> State:
        """Its state as far as this side has seen it."""
        if self._state is State.RUNNING and self.process.exit_code is not None:
            return State.STOPPED
        return self._state

    @property
    def command(self) -> tuple[str, ...]:
        """The command line of its first process."""
        return self.process_spec.args

    def record(self) -> ContainerRecord:
        """Its part of the state document."""
        return ContainerRecord(
            id=self.id,
            image=self.image_name,
            image_digest=self.image_digest,
            process=self.process_spec,
            state=self.state,
            created_unix_ns=self._created_unix_ns,
            exit_code=self.process.exit_code,
        )

    def begin_create(
        self,
        pipeline: Pipeline,
        spec: messages.Spec,
        storages: tuple[messages.Storage, ...],
        detach: Detach | None,
    ) -> None:
        """Send the request that makes it. ``detach`` lets go of its disk when it is removed."""
        self._detach = detach
        request = messages.CreateContainerRequest(
            container_id=self.id, exec_id=self.id, storages=storages, spec=spec
        )
        failpoints.hit("agent.create_container.before")
        self._creating = pipeline.send("CreateContainer", request)

    def begin_start(self, pipeline: Pipeline) -> None:
        """Send the request that starts it."""
        check_transition(self._state, State.RUNNING, op="container.start")
        failpoints.hit("agent.start_container.before")
        self._starting = pipeline.send(
            "StartContainer", messages.ContainerRequest(container_id=self.id)
        )

    def settle(self) -> None:
        """Wait for what was begun. Raises as :meth:`start`."""
        creating, self._creating = self._creating, None
        starting, self._starting = self._starting, None
        try:
            if creating is not None:
                creating.result()
                failpoints.hit("agent.create_container.after")
            if starting is not None:
                starting.result()
                self._state = State.RUNNING
                failpoints.hit("agent.start_container.after")
        except AgentRpcError as error:
            cause = command_error(error, self.command, container_id=self.id)
            if cause is error:
                raise
            raise cause from error

    def start(self) -> None:
        """Start its first process. Blocks: for the agent's answer.

        Raises:
            CommandError: There is no such command, or it can't be executed.
            InvalidStateError: It was started before.
        """
        self.begin_start(Pipeline(self._agent))
        self.settle()
        self._changed()

    @overload
    def exec(
        self,
        command: Sequence[str],
        *,
        capture: Literal[False] = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        terminal: bool = False,
    ) -> Process: ...

    @overload
    def exec(
        self,
        command: Sequence[str],
        *,
        capture: Literal[True],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        terminal: bool = False,
        input: bytes | str | None = None,
        timeout_s: float | None = None,
        limit_bytes: int = CAPTURE_LIMIT_BYTES,
    ) -> ExecResult: ...

    def exec(
        self,
        command: Sequence[str],
        *,
        capture: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        terminal: bool = False,
        input: bytes | str | None = None,
        timeout_s: float | None = None,
        limit_bytes: int = CAPTURE_LIMIT_BYTES,
    ) -> Process | ExecResult:
        """Start another process in it.

        Args:
            command: Program and arguments.
            capture: Wait for its end and return what it wrote, instead of the process.
            env: Variables over the container's.
            cwd: Absolute directory; None: the container's.
            user: As in the container's configuration; None: the container's.
            terminal: Give it a terminal.
            input: With ``capture``: its standard input.
            timeout_s: With ``capture``: seconds until it is killed and DeadlineExceededError raised.
            limit_bytes: With ``capture``: most bytes of output.

        Raises:
            CommandError: There is no such command, or it can't be executed.
            InvalidStateError: The container does not run.

        Blocks: for the agent's answer; with ``capture`` until the process ended.
        """
        if self.state is not State.RUNNING:
            raise InvalidStateError(
                f"exec needs a running container, {self.id} is {self.state.value}",
                state=self.state.value,
                wanted=State.RUNNING.value,
                op="container.exec",
                container_id=self.id,
            )
        exec_id = ExecId(f"exec-{os.urandom(8).hex()}")
        spec = self._exec_spec(command, env, cwd, user, terminal=terminal)
        request = messages.ExecProcessRequest(container_id=self.id, exec_id=exec_id, process=spec)
        process = Process(self._agent, self.id, exec_id, terminal=terminal)
        failpoints.hit("agent.exec.before")
        try:
            self._send_exec(request)
            failpoints.hit("agent.exec.after")
            if not capture:
                return process
            data = input.encode() if isinstance(input, str) else input
            stdout, stderr = process.communicate(data, timeout_s=timeout_s, limit_bytes=limit_bytes)
        except CommandError:
            raise  # nothing was started
        except BaseException:
            # An interruption as well: nobody knows the process, so nobody would end it.
            process.abandon()
            raise
        return captured(process, stdout, stderr)

    def _send_exec(self, request: messages.ExecProcessRequest) -> None:
        try:
            self._agent.call("ExecProcess", request)
        except AgentRpcError as error:
            cause = command_error(error, request.process.args, container_id=self.id)
            if cause is error:
                raise
            raise cause from error

    def _exec_spec(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None,
        cwd: str | None,
        user: str | None,
        *,
        terminal: bool,
    ) -> messages.ProcessSpec:
        from casemate.agent.process import exec_process

        return exec_process(
            self._image, self.process_spec, command, env=env or {}, cwd=cwd, user=user, terminal=terminal
        )

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end of its first process, return the exit status. Raises and blocks as :meth:`Process.wait`."""
        code = self.process.wait(timeout_s)
        if self._state is not State.STOPPED:
            self._state = State.STOPPED
            self._changed()
        return code

    def kill(self, number: int = signal.SIGKILL, *, everyone: bool = False) -> None:
        """Send a signal to its first process, or to all its processes. Blocks: for the agent's answer."""
        if everyone:
            request = messages.SignalProcessRequest(container_id=self.id, exec_id="", signal=int(number))
            self._agent.call("SignalProcess", request)
        else:
            self.process.signal(number)

    def pause(self) -> None:
        """Freeze its processes. Raises: InvalidStateError. Blocks: for the agent's answer."""
        failpoints.hit("agent.pause_container")
        self._move("PauseContainer", State.PAUSED, "container.pause")

    def resume(self) -> None:
        """Thaw its processes. Raises: InvalidStateError. Blocks: for the agent's answer."""
        if self.state is not State.PAUSED:
            check_transition(self.state, self.state, op="container.resume")
        failpoints.hit("agent.resume_container")
        self._move("ResumeContainer", State.RUNNING, "container.resume")

    def _move(self, method: str, wanted: State, op: str) -> None:
        check_transition(self.state, wanted, op=op)
        self._agent.call(method, messages.ContainerRequest(container_id=self.id))
        self._state = wanted
        self._changed()

    def stats(self) -> messages.CgroupStats:
        """Counters of its cgroup: processor time in nanoseconds, memory in bytes. Blocks: for the agent's answer."""
        request = messages.ContainerRequest(container_id=self.id)
        answer = self._agent.ask("StatsContainer", request, messages.StatsContainerResponse)
        return answer.cgroup_stats or messages.CgroupStats()

    def remove(self) -> None:
        """Kill what runs in it and remove it, with its root file system. Blocks: for the agent and the VMM.

        When its disk could not be taken away, another call tries that again.
        """
        if not self._gone or self._detach is None:
            failpoints.hit("agent.remove_container.before")
            self._agent.call("RemoveContainer", messages.RemoveContainerRequest(container_id=self.id))
            self._gone = True
            self._state = State.STOPPED
            failpoints.hit("agent.remove_container.after")
        if self._detach is not None:
            self._detach()
            self._detach = None
        self._changed()


def captured(process: Process, stdout: bytes, stderr: bytes) -> ExecResult:
    """The result of a process that ended."""
    assert process.exit_code is not None
    return ExecResult(exit_code=process.exit_code, stdout_bytes=stdout, stderr_bytes=stderr)


def new_container_id(name: str | None) -> ContainerId:
    """A container's id: its name, or a made-up one."""
    return ContainerId(check_identifier(name, "name") if name is not None else os.urandom(8).hex())
