"""A model of the guest agent: one sandbox, its containers, their processes, and the requests about them, in the order they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from . import wire
from .programs import SIGKILL, SIGTERM, CannotExecute, Process

__all__ = ["Agent", "Refusal"]

INVALID, NOT_FOUND, EXISTS, PRECONDITION, UNIMPLEMENTED, INTERNAL = 3, 5, 6, 9, 12, 13
HEALTH, SERVICE, DEVICES = "grpc.Health", "grpc.AgentService", "casemate.DeviceService"
DEADLINE_EXCEEDED = 4
FEATURES = ("casemate.await_device", "casemate.block_serial", "casemate.ordered", "casemate.username")
_BLOCK_BYTES = 128 << 20

Reply = Callable[[bytes], None]
"""Gives the message of a success, once, now or later."""


class Refusal(Exception):
    """An error status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Container:
    """A container and its processes by their names."""

    def __init__(self, identifier: str, first: Process) -> None:
        self.id = identifier
        self.state = "created"
        self.processes = {identifier: first}


class Agent:
    """Serves requests.

    Args:
        has_disk: Whether the guest sees a disk, given the source of a storage.
        name_of: What the guest calls the device of a subsystem at a PCI path; empty when there is none.
        after: Runs a function some seconds later.
        panic: The guest's end by a panic. power_off: Its friendly end, once the answer is out.
    """

    def __init__(
        self,
        *,
        has_disk: Callable[[str], bool],
        name_of: Callable[[str, str], str],
        after: Callable[[float, Callable[[], None]], None],
        panic: Callable[[], None],
        power_off: Callable[[], None],
    ) -> None:
        self._has_disk = has_disk
        self._name_of = name_of
        self._after = after
        self._panic = panic
        self._power_off = power_off
        self._hostname: str | None = None
        self._containers: dict[str, Container] = {}

    def handle(self, request: wire.Request, reply: Reply) -> None:
        """Serve one request. Raises: Refusal."""
        fields = wire.Fields(request.payload)
        if request.service == HEALTH:
            reply(wire.number(1, 1) if request.method == "Check" else wire.data(1, b"0.0.1"))
            return
        if (request.service, request.method) == (DEVICES, "AwaitDevice"):
            self._await_device(fields, reply)
            return
        serve: Callable[[wire.Fields, Reply], None] | None = getattr(self, f"_{request.method}", None)
        if request.service != SERVICE or serve is None:
            raise Refusal(UNIMPLEMENTED, f"{request.method} is not implemented")
        serve(fields, reply)

    def _await_device(self, fields: wire.Fields, reply: Reply) -> None:
        """At once: what a fake VMM does, its guest has seen."""
        subsystem, pci_path, gone = fields.text(1), fields.text(2), bool(fields.number(3))
        name = self._name_of(subsystem, pci_path)
        if gone is bool(name):
            raise Refusal(DEADLINE_EXCEEDED, f"ETIME: timed out waiting for {subsystem} device at {pci_path}")
        reply(b"" if gone else wire.data(1, name.encode()))

    def _CreateSandbox(self, fields: wire.Fields, reply: Reply) -> None:
        if self._hostname is not None:
            raise Refusal(EXISTS, f"sandbox {self._hostname} exists already")
        self._hostname = fields.text(1)
        reply(b"")

    def _DestroySandbox(self, _: wire.Fields, reply: Reply) -> None:
        for container in self._containers.values():
            _kill(container)
        self._containers.clear()
        reply(b"")
        self._power_off()

    def _GetGuestDetails(self, _: wire.Fields, reply: Reply) -> None:
        features = b"".join(wire.data(6, feature.encode()) for feature in FEATURES)
        details = wire.data(1, b"fake") + wire.number(2, 1) + features
        reply(wire.number(1, _BLOCK_BYTES) + wire.data(2, details))

    def _CreateContainer(self, fields: wire.Fields, reply: Reply) -> None:
        identifier = fields.text(1)
        if self._hostname is None:
            raise Refusal(PRECONDITION, "sandbox: is not created")
        if identifier in self._containers:
            raise Refusal(EXISTS, f"container {identifier} exists already")
        for storage in fields.messages(5):
            driver, source = storage.text(1), storage.text(3)
            if driver in ("blk", "mmioblk") and not self._has_disk(source):
                raise Refusal(4, f"ETIME: timed out after 0 ms waiting for block device {source}")
        spec = wire.Fields(fields.bytes(6))
        process = self._make_process(spec.bytes(2), spec.text(4) or self._hostname)
        self._containers[identifier] = Container(identifier, process)
        reply(b"")

    def _StartContainer(self, fields: wire.Fields, reply: Reply) -> None:
        container = self._container(fields.text(1), INTERNAL)
        if container.state != "created":
            raise Refusal(PRECONDITION, f"container {container.id}: is {container.state}")
        container.state = "running"
        reply(b"")
        container.processes[container.id].start()

    def _RemoveContainer(self, fields: wire.Fields, reply: Reply) -> None:
        container = self._container(fields.text(1), INTERNAL)
        _kill(container)
        del self._containers[container.id]
        reply(b"")

    def _ExecProcess(self, fields: wire.Fields, reply: Reply) -> None:
        container, exec_id = self._container(fields.text(1)), fields.text(2)
        if not exec_id or exec_id in container.processes:
            raise Refusal(EXISTS, f"process {exec_id} exists already")
        if container.state != "running" or container.processes[container.id].status is not None:
            raise Refusal(PRECONDITION, f"container {container.id}: is {container.state}")
        process = self._make_process(fields.bytes(4), self._hostname or "")
        container.processes[exec_id] = process
        reply(b"")
        process.start()

    def _SignalProcess(self, fields: wire.Fields, reply: Reply) -> None:
        container, exec_id, number = self._container(fields.text(1)), fields.text(2), fields.number(3)
        if not exec_id and number == SIGKILL:
            _kill(container)
        else:
            is_first = exec_id in ("", container.id)
            # The first process of a pid namespace has no default action for it.
            self._process(container, exec_id).signal(SIGKILL if is_first and number == SIGTERM else number)
        reply(b"")

    def _WaitProcess(self, fields: wire.Fields, reply: Reply) -> None:
        process = self._process(self._container(fields.text(1)), fields.text(2))
        process.wait(lambda status: reply(wire.number(1, status)))

    def _ReadStdout(self, fields: wire.Fields, reply: Reply) -> None:
        process = self._process(self._container(fields.text(1)), fields.text(2))
        process.stdout.read(fields.number(3), lambda piece: reply(wire.data(1, piece)))

    def _ReadStderr(self, fields: wire.Fields, reply: Reply) -> None:
        process = self._process(self._container(fields.text(1)), fields.text(2))
        if process.terminal:
            raise Refusal(INTERNAL, f"cannot get stream stderr of process {fields.text(2)}")
        process.stderr.read(fields.number(3), lambda piece: reply(wire.data(1, piece)))

    def _WriteStdin(self, fields: wire.Fields, reply: Reply) -> None:
        process = self._process(self._container(fields.text(1)), fields.text(2))
        if not process.write(fields.bytes(3), lambda count: reply(wire.number(1, count))):
            raise Refusal(INTERNAL, "write stdin: EPIPE: Broken pipe")

    def _CloseStdin(self, fields: wire.Fields, reply: Reply) -> None:
        process = self._process(self._container(fields.text(1)), fields.text(2))
        reply(b"")
        process.close_input()

    def _TtyWinResize(self, fields: wire.Fields, reply: Reply) -> None:
        process = self._process(self._container(fields.text(1)), fields.text(2))
        if not process.terminal:
            raise Refusal(14, f"process {fields.text(2)} has no terminal")
        process.size = (fields.number(3), fields.number(4))
        reply(b"")

    def _StatsContainer(self, fields: wire.Fields, reply: Reply) -> None:
        container = self._container(fields.text(1))
        running = sum(process.status is None for process in container.processes.values())
        cpu = wire.data(1, wire.data(1, wire.number(1, time.monotonic_ns())))
        memory = wire.data(2, wire.data(2, wire.number(1, running << 20)))
        reply(wire.data(1, cpu + memory + wire.data(3, wire.number(1, running))))

    def _PauseContainer(self, fields: wire.Fields, reply: Reply) -> None:
        self._move(fields, "running", "paused", reply)

    def _ResumeContainer(self, fields: wire.Fields, reply: Reply) -> None:
        self._move(fields, "paused", "running", reply)

    def _move(self, fields: wire.Fields, now: str, wanted: str, reply: Reply) -> None:
        container = self._container(fields.text(1))
        if container.state != now:
            raise Refusal(PRECONDITION, f"container {container.id}: is {container.state}")
        container.state = wanted
        reply(b"")
        for process in container.processes.values():
            if wanted == "running":
                process.thaw()
            else:
                process.frozen = True

    def _make_process(self, message: bytes, hostname: str) -> Process:
        fields = wire.Fields(message)
        arguments: dict[str, Any] = {"env": fields.texts(5), "cwd": fields.text(6), "hostname": hostname}
        try:
            return Process(
                fields.texts(4),
                **arguments,
                terminal=bool(fields.number(1)),
                after=self._after,
                panic=self._panic,
            )
        except CannotExecute as error:
            raise Refusal(INTERNAL, str(error)) from error

    def _container(self, identifier: str, code: int = INVALID) -> Container:
        try:
            return self._containers[identifier]
        except KeyError as error:
            raise Refusal(code, f"Invalid container id {identifier}") from error

    def _process(self, container: Container, exec_id: str) -> Process:
        try:
            return container.processes[exec_id or container.id]
        except KeyError as error:
            text = f"Invalid exec id {exec_id} of container {container.id}"
            raise Refusal(NOT_FOUND, text) from error


def _kill(container: Container) -> None:
    for process in container.processes.values():
        process.signal(SIGKILL)
