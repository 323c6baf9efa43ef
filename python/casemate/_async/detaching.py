"""From a sandbox of this process to one of a keeper: the steps on the way, and what undoes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from casemate._async.container import AsyncContainer
from casemate._async.hypervisor import AsyncHypervisor
from casemate._async.kept import AsyncKept
from casemate._compat import aio as compat
from casemate.config.sandbox import TimeoutConfig
from casemate.config.settings import Settings
from casemate.keeper.birth import NewKeeper
from casemate.persist.record import ProcessRecord, SandboxRecord
from casemate.persist.store import SandboxDirectory

__all__ = ["AsyncDetaching"]


class AsyncDetaching:
    """The keeper of a sandbox that is being made. Until :meth:`give` has returned, all of it ends with this process.

    Args:
        directory: The sandbox's, held by this process.
    """

    __slots__ = ("_directory", "_keeper", "_sandbox_id", "_settings")

    def __init__(self, settings: Settings, sandbox_id: str, directory: SandboxDirectory) -> None:
        self._settings = settings
        self._sandbox_id = sandbox_id
        self._directory = directory
        self._keeper: NewKeeper | None = None

    @property
    def record(self) -> ProcessRecord | None:
        """The keeper's process; None before :meth:`start`."""
        return None if self._keeper is None else self._keeper.record

    async def start(self, driver: AsyncHypervisor) -> None:
        """Start the keeper and let ``driver`` launch with it.

        Raises: UnsupportedError, HostError, DeadlineExceededError. Blocks: until the keeper has greeted.
        """
        self._keeper = await compat.to_thread(
            NewKeeper.start,
            self._directory.path,
            self._sandbox_id,
            log_bytes=self._settings.log_bytes,
            timeout_factor=self._settings.timeout_factor,
        )
        driver.launch_with(self._keeper)

    async def abandon(self) -> None:
        """End the keeper, and the VMM with it. Idempotent. Raises: DeadlineExceededError. Blocks: for its end."""
        if self._keeper is not None:
            await compat.to_thread(self._keeper.abandon)

    async def give(
        self,
        driver: AsyncHypervisor,
        describe: Callable[[], SandboxRecord],
        containers: Iterable[AsyncContainer],
        timeouts: TimeoutConfig,
    ) -> tuple[AsyncKept, SandboxRecord]:
        """Give the sandbox to the keeper; return it as any process sees it from now on, and its document.

        Args:
            describe: The document as this process would write it.

        Raises: InvalidStateError, HostError, DeadlineExceededError; the sandbox is still this process's then.
        Blocks: for the keeper's answers and a sync.
        """
        keeper = self._keeper
        assert keeper is not None
        record = describe()
        kept = AsyncKept(self._settings, record, timeouts)
        try:
            for container in containers:
                await kept.keep(container.id, record.agent_url, terminal=container.process.terminal)
            record = replace(describe(), owner=keeper.record)
            self._directory.write(record)
            await compat.to_thread(keeper.commit, self._directory.lock_fd, timeout_s=timeouts.control_s)
        except BaseException:
            kept.close()
            raise
        self._directory.release()
        driver.hand_over()
        keeper.leave()
        return kept, record
