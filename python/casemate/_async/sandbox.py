"""A sandbox: one virtual machine, its agent, its containers. Order and rollback; the rest is delegated."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from casemate._async.container import AsyncContainer, new_container_id
from casemate._async.guest import AsyncGuestLink
from casemate._async.undo import AsyncUndoStack, raise_with
from casemate._compat import aio as compat
from casemate.agent import messages
from casemate.agent.spec import build_process, build_spec, build_storages
from casemate.config.container import ContainerConfig
from casemate.config.sandbox import SandboxConfig
from casemate.config.settings import Settings
from casemate.errors import AlreadyExistsError, CasemateError, InvalidStateError, NotFoundError
from casemate.observe.timings import PhaseClock, split_boot
from casemate.persist.record import SandboxRecord
from casemate.persist.store import SandboxDirectory, process_record
from casemate.types import ContainerId, Phase, SandboxId, State, check_transition

if TYPE_CHECKING:
    from casemate._async.agent import AsyncPending
    from casemate.images import Image

__all__ = ["AsyncSandbox"]

GUEST_HOSTNAME_BYTES = 64


class AsyncSandbox:
    """One virtual machine with an agent in it, and the containers there. It ends with its owner.

    Make it with :meth:`create`; use it as a context manager or call :meth:`aclose`.

    Attributes:
        id: Its name on this host.
        config: What it was made from.
    """

    __slots__ = (
        "_clock",
        "_containers",
        "_created_unix_ns",
        "_directory",
        "_link",
        "_lock",
        "_settings",
        "_state",
        "_undo",
        "config",
        "guest",
        "id",
    )

    def __init__(self, config: SandboxConfig, settings: Settings, sandbox_id: SandboxId) -> None:
        self.id = sandbox_id
        self.config = config
        self.guest = messages.GuestDetailsResponse()
        self._settings = settings
        self._clock = PhaseClock()
        self._state = State.READY
        self._created_unix_ns = time.time_ns()
        self._containers: dict[ContainerId, AsyncContainer] = {}
        self._undo = AsyncUndoStack()
        self._lock = compat.Lock()
        self._directory: SandboxDirectory | None = None
        self._link: AsyncGuestLink | None = None

    @classmethod
    async def create(
        cls,
        config: SandboxConfig | None = None,
        *,
        containers: Sequence[ContainerConfig] = (),
        start: bool = False,
        settings: Settings | None = None,
        progress: Callable[[object], None] | None = None,
    ) -> AsyncSandbox:
        """Boot a virtual machine and wait until its agent is ready.

        Args:
            config: Its size and guest; None: the defaults.
            containers: Containers to make at once; their images are plugged in before the boot, which costs least.
            start: Start these containers too.
            settings: Where things lie; None: from the environment.
            progress: Called with progress events while a kernel is fetched or an image unpacked.

        Returns: The running sandbox.

        Raises:
            InvalidConfigError: A value can't be used; nothing was made.
            NotFoundError, ImageError: An image is unknown or damaged; nothing was made.
            UnsupportedError: The host lacks something, named in the text; nothing was made.
            AlreadyExistsError: The name is taken.
            VmmExitedError: The VMM ended during the boot, with the cause.
            DeadlineExceededError: The agent did not answer in ``timeouts.boot_s``.

        Blocks: for the boot. A failure or a cancellation leaves nothing behind.
        """
        config = config if config is not None else SandboxConfig()
        settings = settings if settings is not None else Settings.from_environment()
        sandbox = cls(config, settings, SandboxId(config.name or f"s-{secrets.token_hex(6)}"))
        try:
            await sandbox._create(tuple(containers), start, progress)
        except BaseException as error:
            failures = await sandbox._undo.unwind()
            cause = raise_with(error, failures)
            if cause is error:
                raise
            raise cause from error
        return sandbox

    async def _create(
        self,
        containers: tuple[ContainerConfig, ...],
        start: bool,
        progress: Callable[[object], None] | None,
    ) -> None:
        named = [(new_container_id(one.name), one) for one in containers]
        if len({container_id for container_id, _ in named}) != len(named):
            raise AlreadyExistsError("two containers have the same name; give each a name of its own")
        images = [await self._resolve_image(one.image, progress) for one in containers]
        link = await AsyncGuestLink.plan(
            self.id, self.config, self._settings, disks=[image.rootfs for image in images], progress=progress
        )
        self._clock.mark("plan")
        self._directory = SandboxDirectory.take(self._settings, self.id)
        self._undo.push("state directory", self._remove_directory)
        self._link = link
        self._save()
        self._undo.push("virtual machine", link.stop)
        await link.start(self._directory.path)
        self._save()
        self._clock.mark("vmm_spawn")
        await link.connect()
        self._clock.mark("boot")
        pending: list[AsyncPending] = []
        await self._send(pending, self._submit_create_sandbox())
        details = link.agent.submit("GetGuestDetails", messages.GuestDetailsRequest(mem_block_size=True))
        made = []
        for (container_id, config), image, disk in zip(named, images, link.disks, strict=True):
            container = self._new_container(container_id, config, image, disk.driver, disk.source)
            await self._send(pending, self._submit_create_container(container, disk.driver, disk.source))
            made.append(container)
        starts = []
        for container in made if start else ():
            starts.append(container.submit_start())
            container.process.stdout.prefetch()
        await self._settle(pending)
        self.guest = messages.decode(await details.result(), messages.GuestDetailsResponse)
        features = self.guest.agent_details.extra_features if self.guest.agent_details is not None else ()
        self._clock.mark("container" if made else "sandbox")
        self._clock.split("boot", split_boot(self._phase("boot"), features))
        for container, request in zip(made, starts, strict=False):
            await container._started(request)
        if starts:
            self._clock.mark("start")
        for container in made:
            self._containers[container.id] = container
        self._state = State.RUNNING
        self._save()
