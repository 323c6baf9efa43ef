"""Starting a keeper, and handing a sandbox over to it."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path

from casemate import _core
from casemate.errors import (
    HostError,
    InvalidStateError,
    NotFoundError,
    UnsupportedError,
)
from casemate.hypervisor import VmmProcess
from casemate.keeper.client import KeeperClient, encode_bytes
from casemate.keeper.vmm import KeptVmm
from casemate.observe import failpoints
from casemate.observe.log import Log
from casemate.persist.record import ProcessRecord
from casemate.persist.store import kill_recorded, process_record

__all__ = ["NewKeeper"]

_log = Log(__name__)

_CONTROL_FD = 3
_START_S = 10.0


class NewKeeper:
    """A keeper that is this process's until it is committed: till then it ends with this connection.

    Attributes:
        record: Its process, for the state document.
    """

    __slots__ = ("_client", "_directory", "_pidfd", "record")

    def __init__(self, client: KeeperClient, directory: Path, record: ProcessRecord, pidfd: int) -> None:
        self._client = client
        self._directory = directory
        self._pidfd = pidfd
        self.record = record

    @classmethod
    def start(
        cls, directory: Path, sandbox_id: str, *, log_bytes: int, timeout_factor: float = 1.0
    ) -> NewKeeper:
        """Start one for the sandbox in ``directory``: a process of its own session that nobody has to wait for.

        Raises:
            UnsupportedError: This installation has no keeper.
            HostError: It can't be started.
            DeadlineExceededError: It did not greet.
        Blocks: until it has greeted, milliseconds.
        """
        program = keeper_path()
        failpoints.hit("keeper.spawn")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        client = KeeperClient(ours, sandbox_id)
        words = [str(program), "--directory", str(directory), "--control-fd", str(_CONTROL_FD)]
        words += ["--log-bytes", str(log_bytes)]
        try:
            with theirs:
                starter = _core.spawn(words, fds=[(theirs.fileno(), _CONTROL_FD)], env={}, cwd="/")
            status = starter.wait(_START_S * timeout_factor)
            if status != 0:
                text = starter.stderr_tail().decode("utf-8", "replace").strip()
                raise HostError(
                    f"the keeper {program} ended with status {status}: {text}",
                    target=str(program),
                    op="keeper.start",
                    sandbox_id=sandbox_id,
                )
            hello = client.receive(timeout_s=_START_S * timeout_factor)
            record = process_record(hello["keeper_pid"])
            pidfd = os.pidfd_open(record.pid)
        except (InvalidStateError, NotFoundError, ProcessLookupError) as error:
            client.close()
            raise HostError(
                f"the keeper {program} ended at once; its log may tell why",
                target=str(program),
                op="keeper.start",
                sandbox_id=sandbox_id,
            ) from error
        except BaseException:
            client.close()
            raise
        return cls(client, directory, record, pidfd)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        fds: Sequence[tuple[int, int]],
        console_fd: int,
        vsock: tuple[int, Path, int] | None,
        timeout_s: float,
    ) -> KeptVmm:
        """Let it start the VMM, tied to it. All descriptors are borrowed.

        Args:
            fds: As of ``_core.spawn``.
            console_fd: Read into a bounded tail.
            vsock: The vhost-user socket, where the hybrid socket shall be, the guest's context id; None: not served by the keeper.

        Raises: HostError: The VMM or the device can't be started; InvalidStateError: The keeper has ended.
        Blocks: for fork and exec.
        """
        failpoints.hit("keeper.request")
        borrowed = [fd for fd, _ in fds] + [console_fd] + ([] if vsock is None else [vsock[0]])
        answer = self._client.request(
            "spawn",
            timeout_s=timeout_s,
            borrow_fds=borrowed,
            argv=[encode_bytes(word) for word in argv],
            env=[(encode_bytes(key), encode_bytes(value)) for key, value in os.environ.items()],
            cwd=encode_bytes(Path.cwd()),
            fds=[number for _, number in fds],
            console=True,
            vsock=None if vsock is None else {"path": encode_bytes(vsock[1]), "cid": vsock[2]},
        )
        process = VmmProcess(pid=answer["pid"], start_time_ticks=answer["start_time_ticks"])
        return KeptVmm(self._directory, process, self.record)

    def commit(self, borrow_lock_fd: int, *, timeout_s: float) -> None:
        """From here on the sandbox is the keeper's, with its lock. Raises as :meth:`spawn`. Blocks: for the answer."""
        failpoints.hit("keeper.commit")
        self._client.request("commit", timeout_s=timeout_s, borrow_fds=[borrow_lock_fd])
        failpoints.hit("keeper.committed")

    def leave(self) -> None:
        """Let go of it. One that was committed goes on, another ends with its VMM. Idempotent."""
        self._client.close()
        if self._pidfd >= 0:
            fd, self._pidfd = self._pidfd, -1
            os.close(fd)

    def abandon(self) -> None:
        """End it, with its VMM. Idempotent.

        Raises: DeadlineExceededError: It does not end.
        Blocks: for its end.
        """
        if self._pidfd < 0:
            return
        self._client.close()
        try:
            ready, _, _ = select.select([self._pidfd], [], [], _START_S)
            if not ready:
                _log.warning("the keeper does not end and is killed", extra={"op": "keeper.abandon"})
                kill_recorded(self.record)
        finally:
            self.leave()


def keeper_path() -> Path:
    """The keeper's program. Raises: UnsupportedError: It is not installed."""
    path = Path(__file__).parent.parent / "_bin" / "casemate-keeper"
    if not os.access(path, os.X_OK):
        raise UnsupportedError(
            f"detached sandboxes need the keeper, and {path} is not there or not executable; "
            "install a wheel of casemate, or run `./dev setup` in a source tree",
            capability="keeper",
        )
    return path
