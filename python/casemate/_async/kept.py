"""A detached sandbox as a process that uses it sees it: its VMM and its keeper belong to nobody here."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from casemate._async.hypervisor.qemu import QMP_SOCKET
from casemate._async.qmp import AsyncQmpClient
from casemate._compat import aio as compat
from casemate.config.sandbox import TimeoutConfig
from casemate.config.settings import Settings
from casemate.errors import (
    DeadlineExceededError,
    HypervisorError,
    InvalidStateError,
    NotFoundError,
    VmmExitedError,
)
from casemate.hypervisor import VmmProcess
from casemate.keeper.client import KeeperClient, encode_bytes
from casemate.keeper.vmm import KeptVmm
from casemate.observe import failpoints
from casemate.observe.log import Log
from casemate.persist.record import ProcessRecord, SandboxRecord
from casemate.persist.recovery import cleanup
from casemate.persist.store import (
    kill_recorded,
    load_record,
    read_start_time_ticks,
    sandboxes_root,
    write_record,
)

__all__ = ["AsyncKept"]

_log = Log(__name__)

_END_S = 15.0

T = TypeVar("T")
Update = Callable[[SandboxRecord], SandboxRecord]


class AsyncKept:
    """The keeper, the VMM and the state document of a detached sandbox.

    Args:
        record: The sandbox's document.
        timeouts: How patient to be, already scaled.

    Raises:
        InvalidStateError: Its VMM has ended.

    Attributes:
        process: The VMM.
        directory: The state directory.
    """

    __slots__ = ("_keeper", "_sandbox_id", "_settings", "_timeouts", "directory", "process")

    def __init__(self, settings: Settings, record: SandboxRecord, timeouts: TimeoutConfig) -> None:
        assert record.keeper is not None
        assert record.vmm is not None
        self._keeper: ProcessRecord = record.keeper
        self._sandbox_id = record.id
        self._settings = settings
        self._timeouts = timeouts
        self.directory: Path = sandboxes_root(settings) / record.id
        vmm = VmmProcess(pid=record.vmm.pid, start_time_ticks=record.vmm.start_time_ticks)
        self.process = KeptVmm(self.directory, vmm, record.keeper)

    def close(self) -> None:
        """Let go; the sandbox stays as it is. Idempotent."""
        self.process.close()

    async def exit_error(self, wait_s: float = 1.0) -> VmmExitedError | None:
        """Why the VMM ended; None when it has not within ``wait_s``. Blocks: until then."""
        from casemate.hypervisor.qemu.failure import describe_exit

        ended = await compat.wait_readable([self.process.fileno()], time.monotonic() + wait_s)
        if not ended:
            return None
        status = await compat.to_thread(self.process.wait, wait_s)
        return describe_exit(
            status,
            self.process.stderr_tail(),
            self.process.console_tail(),
            sandbox_id=self._sandbox_id,
            op="qemu.run",
        )

    async def keep(self, container_id: str, agent_url: str, *, terminal: bool) -> None:
        """Let the keeper take down a container's output and its end. Raises: InvalidStateError. Blocks: for its answer."""
        scheme, _, rest = agent_url.partition("://")
        address, _, _ = rest.rpartition(":")
        agent = {"hybrid": encode_bytes(address)} if scheme == "hvsock" else {"vsock": int(address)}
        failpoints.hit("keeper.keep")
        await self._ask("keep", container=container_id, terminal=terminal, agent=agent)

    async def forget(self, container_id: str) -> None:
        """Drop a removed container's log and exit record. Blocks: for the keeper's answer."""
        # It is not kept when its making failed.
        with contextlib.suppress(NotFoundError):
            await self._ask("forget", container=container_id)

    async def update(self, change: Update) -> SandboxRecord:
        """Change the state document: what stands there now goes through ``change``. One process at a time.

        Raises: InvalidStateError, HostError, DeadlineExceededError with the name of who holds it.
        Blocks: while another process changes it, and for a sync.
        """
        return await compat.to_thread(self.update_now, change)

    def update_now(self, change: Update) -> SandboxRecord:
        """As :meth:`update`, in the calling thread."""
        with self._take_turn("state"):
            record = change(load_record(self._settings, self._sandbox_id))
            write_record(self.directory, record)
        return record

    async def pause(self) -> None:
        """Stop the vCPUs. Raises: QmpError, VmmExitedError, DeadlineExceededError. Blocks: until QEMU has."""
        await self._execute("stop")

    async def resume(self) -> None:
        """Let the vCPUs go on. Raises and blocks as :meth:`pause`."""
        await self._execute("cont")

    async def end(self) -> None:
        """End the VMM and the keeper and remove the directory. Fine when another process has done some of it.

        Raises:
            DeadlineExceededError: One of them does not end.
            HostError: Something can't be removed.
        Blocks: until then.
        """
        try:
            await self._execute("quit")
            await compat.wait_readable([self.process.fileno()], time.monotonic() + self._timeouts.stop_s)
        except VmmExitedError:
            pass  # what was wanted
        except (HypervisorError, InvalidStateError, DeadlineExceededError) as error:
            _log.warning(
                "QEMU does not quit and is killed",
                extra={"sandbox": self._sandbox_id, "op": "sandbox.stop", "cause": str(error)},
            )
        await compat.to_thread(self._end_keeper)
        try:
            await compat.to_thread(cleanup, self._settings, self._sandbox_id)
        except InvalidStateError:
            # Another process removes it at this moment, or has made a new one of the name.
            _log.info("somebody else removes it", extra={"sandbox": self._sandbox_id, "op": "sandbox.stop"})

    def _end_keeper(self) -> None:
        """It ends by itself when the VMM has; one that does not is asked, then killed."""
        try:
            pidfd = os.pidfd_open(self._keeper.pid)
        except ProcessLookupError:
            return
        try:
            if read_start_time_ticks(self._keeper.pid) != self._keeper.start_time_ticks:
                return
            # Gone in the meantime: what was wanted.
            with (
                contextlib.suppress(InvalidStateError),
                KeeperClient.connect(self.directory, self._sandbox_id) as client,
            ):
                client.request("end", timeout_s=self._timeouts.control_s)
            if not select.select([pidfd], [], [], _END_S)[0]:
                _log.warning("the keeper does not end and is killed", extra={"sandbox": self._sandbox_id})
                kill_recorded(self._keeper)
        finally:
            os.close(pidfd)

    async def _ask(self, op: str, **fields: Any) -> None:
        await compat.to_thread(self._ask_now, op, fields)

    def _ask_now(self, op: str, fields: dict[str, Any]) -> None:
        with KeeperClient.connect(self.directory, self._sandbox_id) as client:
            client.request(op, timeout_s=self._timeouts.control_s, **fields)

    async def use_qmp(self, work: Callable[[AsyncQmpClient], compat.Later[T]]) -> T:
        """Do ``work`` with a connection of QEMU that nobody else has meanwhile.

        Raises: DeadlineExceededError with the name of who holds it; InvalidStateError, VmmExitedError, and what ``work`` raises.
        Blocks: for its turn, and for ``work``.
        """
        turns: list[KeeperClient] = []

        async def take() -> None:
            turns.append(await compat.to_thread(self._take_turn, "qmp"))

        try:
            # Whole also when cancelled: a turn that came after that would be given back by nobody.
            await compat.shielded(take())
            client = self._connect_qmp()
            try:
                await client.negotiate(timeout_s=self._timeouts.control_s)
                return await work(client)
            finally:
                client.close()
        finally:
            for turn in turns:
                turn.close()

    async def read(self) -> SandboxRecord:
        """The state document as it is now. Blocks: for a file read."""
        return await compat.to_thread(load_record, self._settings, self._sandbox_id)

    async def _execute(self, command: str) -> None:
        async def run(client: AsyncQmpClient) -> None:
            await client.execute(command, timeout_s=self._timeouts.control_s)

        await self.use_qmp(run)

    def _connect_qmp(self) -> AsyncQmpClient:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self.directory / QMP_SOCKET))
        except OSError as error:
            connection.close()
            raise HypervisorError(
                f"QEMU's control socket can't be reached: {error.strerror}",
                op="qemu.connect",
                sandbox_id=self._sandbox_id,
            ) from error
        return AsyncQmpClient(connection, explain=self._explain)

    async def _explain(self, error: HypervisorError) -> Exception:
        ended = await self.exit_error()
        return error if ended is None else ended

    def _take_turn(self, at: str) -> KeeperClient:
        """A connection that has the turn as long as it is open."""
        client = KeeperClient.connect(self.directory, self._sandbox_id)
        started = time.monotonic()
        try:
            client.request("turn", timeout_s=self._timeouts.control_s, at=at)
        except DeadlineExceededError as error:
            client.close()
            raise DeadlineExceededError(
                f"process {self._holder(at)} has used the {at} of sandbox {self._sandbox_id!r} for too long; "
                "try again when it is done, or end it",
                deadline_s=self._timeouts.control_s,
                waited_s=time.monotonic() - started,
                op=f"keeper.{at}",
                sandbox_id=self._sandbox_id,
            ) from error
        except BaseException:
            client.close()
            raise
        return client

    def _holder(self, at: str) -> int:
        with KeeperClient.connect(self.directory, self._sandbox_id) as client:
            status = client.request("status", timeout_s=self._timeouts.control_s)
        return int(status["turns"].get(at, 0))
