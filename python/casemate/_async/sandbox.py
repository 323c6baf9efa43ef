"""A sandbox: one virtual machine, its agent, its containers. Order and rollback; the rest is delegated.

Longer than other modules: it is the one public noun with most operations, and a third of it tells what they raise and wait for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec.structs import replace

from casemate import _core
from casemate._async.agent import AsyncAgentClient, AsyncPipeline
from casemate._async.container import AsyncContainer, Changed, Detach, new_container_id
from casemate._async.guest import begin_container, image_disk, steps
from casemate._async.link import await_agent, dial_agent
from casemate._async.monitor import AsyncEvents, AsyncMonitor
from casemate._async.pull import prepare_image
from casemate._async.undo import AsyncUndoStack, raise_with
from casemate._compat import aio as compat
from casemate.agent import messages
from casemate.agent.transport import Transport, choose_host_port
from casemate.config.container import ContainerConfig
from casemate.config.sandbox import SandboxConfig, TimeoutConfig
from casemate.config.settings import Settings
from casemate.errors import (
    AgentConnectionError,
    AgentRpcError,
    AlreadyExistsError,
    CasemateError,
    InvalidStateError,
    NotFoundError,
    UnsupportedError,
    VmmExitedError,
)
from casemate.hypervisor import BlockAddress
from casemate.hypervisor.boot import boot_assets
from casemate.observe import failpoints
from casemate.observe.log import Log
from casemate.observe.timings import PhaseClock
from casemate.persist.record import ProcessRecord, SandboxRecord, with_container
from casemate.persist.recovery import CleanupReport, SandboxInfo, cleanup, list_sandboxes
from casemate.persist.store import SandboxDirectory, process_record
from casemate.types import (
    Attachment,
    BlockAttachment,
    ContainerId,
    Event,
    NicAttachment,
    Phase,
    Progress,
    SandboxId,
    State,
    check_transition,
)

if TYPE_CHECKING:
    from casemate._async.devices import AsyncDevices
    from casemate._async.hypervisor import AsyncHypervisor
    from casemate._async.kept import AsyncKept
    from casemate._async.kept_devices import AsyncKeptDevices
    from casemate._async.logs import AsyncLogReader
    from casemate.guest import GuestAssets
    from casemate.images import Image
    from casemate.keeper.birth import NewKeeper

__all__ = ["AsyncSandbox"]

_log = Log(__name__)

GUEST_HOSTNAME_BYTES = 64


class AsyncSandbox:
    """One virtual machine with an agent in it, and the containers there. It ends with its owner, unless it is detached.

    Make it with :meth:`create` or reach one with :meth:`attach`; use it as a context manager or call :meth:`aclose`.

    Attributes:
        id: Its name on this host.
        config: What it was made from.
        guest: What the agent said of the guest.
        agent_url: The agent's address: ``hvsock://<path>:1024`` or ``vsock://<cid>:1024``.
    """

    __slots__ = (
        "_agent",
        "_assets",
        "_clock",
        "_containers",
        "_created_unix_ns",
        "_devices",
        "_directory",
        "_driver",
        "_host_port",
        "_keeper",
        "_kept",
        "_lock",
        "_monitor",
        "_pid",
        "_record",
        "_saving",
        "_settings",
        "_state",
        "_stopping",
        "_timeouts",
        "_undo",
        "_vmm",
        "agent_url",
        "config",
        "guest",
        "id",
    )

    _ON_TRIAL: ClassVar = False
    """Whether the accelerator is taken as the configuration names it, whatever is known of it."""

    def __init__(self, sandbox_id: SandboxId, config: SandboxConfig, settings: Settings) -> None:
        self.id = sandbox_id
        self.config = config
        self.guest = messages.GuestDetailsResponse()
        self._settings = settings
        self._timeouts: TimeoutConfig = config.timeouts.scaled(settings.timeout_factor)
        self._clock = PhaseClock()
        self._pid = os.getpid()
        self._state = State.READY
        self._created_unix_ns = time.time_ns()
        self._containers: dict[ContainerId, AsyncContainer] = {}
        self._undo = AsyncUndoStack()
        self._lock = compat.Lock()
        self._stopping = compat.Lock()
        self._saving = threading.Lock()
        self._directory: SandboxDirectory | None = None
        self._driver: AsyncHypervisor | None = None
        self._devices: AsyncDevices | AsyncKeptDevices | None = None
        self._keeper: NewKeeper | None = None
        self._kept: AsyncKept | None = None
        self._host_port = choose_host_port()
        self._agent: AsyncAgentClient | None = None
        self._monitor: AsyncMonitor | None = None
        self._record: SandboxRecord | None = None
        self._assets: GuestAssets | None = None
        self._vmm: ProcessRecord | None = None
        self.agent_url = ""

    @classmethod
    async def create(
        cls,
        config: SandboxConfig | None = None,
        *,
        containers: Sequence[ContainerConfig] = (),
        start: bool = False,
        detached: bool = False,
        settings: Settings | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> AsyncSandbox:
        """Boot a virtual machine and wait until its agent is ready.

        Args:
            config: Its size and guest; None: the defaults.
            containers: Containers to make at once; their images are plugged in before the boot, which costs least.
            start: Start these containers too.
            detached: Give it to a keeper: it goes on when this process ends, and :meth:`attach` reaches it from any process.
                The keeper takes down what the containers write (:meth:`logs`); :meth:`stop` ends it.
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
        failpoints.arm_from_settings(settings.failpoints)
        sandbox = cls(SandboxId(config.name or f"s-{os.urandom(6).hex()}"), config, settings)
        try:
            await sandbox._create(tuple(containers), start, detached, progress)
        except BaseException as error:
            sandbox._state = State.STOPPED
            failures = await sandbox._undo.unwind()
            cause = raise_with(error, failures)
            if cause is error:
                raise
            raise cause from error
        return sandbox

    @classmethod
    async def attach(cls, sandbox_id: str, *, settings: Settings | None = None) -> AsyncSandbox:
        """Reach a living sandbox: a detached one, or one that another process owns. Closing the result leaves it alone.

        Of a detached one everything is possible from here but later containers; of another's only what concerns its containers.

        Raises:
            NotFoundError: There is none of that name.
            InvalidStateError: Whoever held it is dead, with the cause, or it is not running yet.
            AgentConnectionError, DeadlineExceededError: Its agent can't be reached.

        Blocks: until its agent is connected.
        """
        from casemate._async.attach import find_image, find_living, reach

        settings = settings if settings is not None else Settings.from_environment()
        record = await compat.to_thread(find_living, settings, sandbox_id)
        sandbox = cls(SandboxId(sandbox_id), SandboxConfig(name=sandbox_id), settings)
        sandbox._record = record
        sandbox._state = record.state
        sandbox._kept, sandbox._agent = await reach(settings, record, sandbox._timeouts)
        sandbox.agent_url = record.agent_url
        sandbox._undo.push("agent connection", sandbox._close_agent)
        is_kept = sandbox._kept is not None
        for one in record.containers:
            name = ContainerId(one.id)
            more: dict[str, Any] = (
                {"changed": sandbox._noting(name), "detach": sandbox._forgetting(name)} if is_kept else {}
            )
            image = await find_image(settings, one.image_digest)
            sandbox._containers[name] = AsyncContainer(sandbox._agent, one, image=image, kept=is_kept, **more)
        return sandbox

    @staticmethod
    async def list(*, settings: Settings | None = None) -> tuple[SandboxInfo, ...]:
        """All sandboxes of this host's state root, living and dead, by name.

        Raises: HostError: The state root can't be read.
        Blocks: for file reads.
        """
        settings = settings if settings is not None else Settings.from_environment()
        return await compat.to_thread(list_sandboxes, settings)

    @staticmethod
    async def cleanup(sandbox_id: str, *, settings: Settings | None = None) -> CleanupReport:
        """Remove everything that a dead owner left of a sandbox, from what lies on disk alone. Idempotent.

        A state document that can't be read does not stop it; ``unverified`` of the result then says what could not be looked up.

        Raises:
            InvalidStateError: The owner lives; nothing was touched.
            InvalidConfigError: That is no name of a sandbox.
            DeadlineExceededError: A VMM that was left does not end; its directory stays.
            HostError: Something can't be removed.
        Blocks: for the end of a VMM, if one is left.
        """
        settings = settings if settings is not None else Settings.from_environment()
        return await compat.to_thread(cleanup, settings, sandbox_id)

    async def _create(
        self,
        containers: tuple[ContainerConfig, ...],
        start: bool,
        detached: bool,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        named = [(new_container_id(one.name), one) for one in containers]
        if len({container_id for container_id, _ in named}) != len(named):
            raise AlreadyExistsError("two containers have the same name; give each a name of its own")
        images = [await self._resolve_image(one, progress) for one in containers]
        driver, addresses = await self._plan(images, progress)
        self._clock.mark("plan")
        failpoints.hit("sandbox.planned")
        await self._boot(driver, detached=detached)
        await self._prepare_guest(list(zip(named, images, addresses, strict=True)), start)
        if detached:
            # As a whole: a sandbox belongs to one process at every moment.
            await compat.shielded(self._give_to_keeper(driver))

    async def _plan(
        self, images: Sequence[Image], progress: Callable[[Progress], None] | None
    ) -> tuple[AsyncHypervisor, tuple[BlockAddress, ...]]:
        """Decide on everything; nothing is made."""
        # Here, not above: who only names a sandbox, or reaches one of another process, needs no driver.
        from casemate._async.hypervisor.drivers import make_driver

        driver, self._assets = await make_driver(
            self.config,
            self._settings,
            sandbox_id=self.id,
            progress=steps(progress),
            on_trial=self._ON_TRIAL,
        )
        boot = boot_assets(
            self.config,
            self._guest_assets(),
            driver.accel_name,
            host_port=self._host_port,
            tsc_khz=_core.tsc_khz() if driver.accel_name == "tcg" else None,
        )
        return driver, driver.plan(
            boot, [image_disk(f"rootfs{index}", image) for index, image in enumerate(images)]
        )

    async def _boot(self, driver: AsyncHypervisor, *, detached: bool) -> None:
        self._directory = SandboxDirectory.take(self._settings, self.id)
        self._undo.push("state directory", self._remove_directory)
        self._driver = driver
        driver.changed = self._written
        self._save()
        if detached:
            # As a whole: nobody would know of a keeper whose start was given up.
            await compat.shielded(self._start_keeper(driver))
            self._save()
            failpoints.hit("keeper.recorded")
        self._undo.push("virtual machine", driver.stop)
        transport = await driver.prepare(self._directory.path)
        self.agent_url = transport.url
        failpoints.hit("sandbox.listen")
        with transport.listen(self._host_port) as listener:
            started = await driver.start()
            self._vmm = ProcessRecord(pid=started.pid, start_time_ticks=started.start_time_ticks)
            self._save()
            self._clock.mark("vmm_spawn")
            failpoints.hit("sandbox.connect")
            self._agent = await self._connect(driver, transport, listener)
            self._undo.push("agent connection", self._close_agent)
        self._clock.mark("boot")

    async def _start_keeper(self, driver: AsyncHypervisor) -> None:
        from casemate.keeper.birth import NewKeeper

        assert self._directory is not None
        self._keeper = await compat.to_thread(
            NewKeeper.start,
            self._directory.path,
            self.id,
            log_bytes=self._settings.log_bytes,
            timeout_factor=self._settings.timeout_factor,
        )
        self._undo.push("keeper", self._abandon_keeper)
        driver.launch_with(self._keeper)

    async def _abandon_keeper(self) -> None:
        if self._keeper is not None:
            await compat.to_thread(self._keeper.abandon)

    async def _give_to_keeper(self, driver: AsyncHypervisor) -> None:
        """From here on the sandbox is the keeper's; until it says so, all of it ends with this process."""
        from casemate._async.kept import AsyncKept

        keeper, directory = self._keeper, self._directory
        assert keeper is not None
        assert directory is not None
        kept = AsyncKept(self._settings, self._make_record(), self._timeouts)
        try:
            for container in self._containers.values():
                await kept.keep(container.id, self.agent_url, terminal=container.process.terminal)
            self._record = replace(self._make_record(), owner=keeper.record)
            directory.write(self._record)
            await compat.to_thread(keeper.commit, directory.lock_fd, timeout_s=self._timeouts.control_s)
        except BaseException:
            kept.close()
            raise
        self._undo.forget()
        self._undo.push("agent connection", self._close_agent)
        self._kept, self._driver = kept, None
        directory.release()
        driver.hand_over()
        keeper.leave()
        self._clock.mark("hand_over")

    async def _connect(
        self, driver: AsyncHypervisor, transport: Transport, listener: socket.socket
    ) -> AsyncAgentClient:
        boot_s, request_s = self._timeouts.boot_s, self._timeouts.request_s
        if self._guest_assets().agent == "casemate":
            return await await_agent(
                driver, transport, listener, timeout_s=boot_s, request_timeout_s=request_s
            )
        return await dial_agent(transport, driver, timeout_s=boot_s, request_timeout_s=request_s)

    async def _prepare_guest(
        self,
        wanted: Sequence[tuple[tuple[ContainerId, ContainerConfig], Image, BlockAddress]],
        start: bool,
    ) -> None:
        """Send all that makes the first containers at once, then read the answers."""
        agent = self._running_agent("create")
        hostname = (self.config.hostname or self.id)[:GUEST_HOSTNAME_BYTES]
        pipeline = AsyncPipeline(agent)
        failpoints.hit("agent.create_sandbox.before")
        created = await pipeline.send(
            "CreateSandbox", messages.CreateSandboxRequest(hostname=hostname, sandbox_id=self.id)
        )
        details = agent.submit("GetGuestDetails", messages.GuestDetailsRequest(mem_block_size=True))
        made = []
        for (container_id, config), image, address in wanted:
            container = await self._begin_container(
                pipeline, container_id, config, image, address, self._forgetting(container_id)
            )
            made.append(container)
            if start:
                await container.begin_start(pipeline)
                if self._keeper is None:
                    container.process.stdout.prefetch()
        await created.result()
        failpoints.hit("agent.create_sandbox.after")
        self.guest = messages.decode(await details.result(), messages.GuestDetailsResponse)
        self._clock.mark("sandbox")
        if self.guest.agent_details is not None:
            self._clock.split_boot(self.guest.agent_details.extra_features)
        for container in made:
            await container.settle()
            self._containers[container.id] = container
        if made:
            self._clock.mark("container")
        self._state = State.RUNNING
        self._save()

    async def _begin_container(
        self,
        pipeline: AsyncPipeline,
        container_id: ContainerId,
        config: ContainerConfig,
        image: Image,
        address: BlockAddress,
        detach: Detach | None,
    ) -> AsyncContainer:
        return await begin_container(
            pipeline,
            container_id,
            config,
            image,
            address,
            hostname=self.config.hostname or self.id,
            changed=self._noting(container_id),
            detach=detach,
            kept=self._keeper is not None,
        )

    async def create_container(
        self, config: ContainerConfig, *, progress: Callable[[Progress], None] | None = None
    ) -> AsyncContainer:
        """Make a container; its image is plugged into the running machine.

        Raises:
            NotFoundError, ImageError: The image is unknown or damaged.
            AlreadyExistsError: A container has that name.
            ResourceExhaustedError: No port is free.
            UnsupportedError: The machine can't hot-plug (microvm): name the container at :meth:`create`.
            InvalidStateError: The sandbox does not run, or belongs to another process.

        Blocks: until the guest has the disk and the agent has made the container. A failure leaves nothing behind.
        """
        agent, driver = self._running_agent("create_container"), self._own_driver("create_container")
        container_id = new_container_id(config.name)
        async with self._lock:
            if container_id in self._containers:
                raise AlreadyExistsError(
                    f"the sandbox has a container named {container_id!r} already", container_id=container_id
                )
            image = await self._resolve_image(config, progress)
            disk = image_disk(f"rootfs-{os.urandom(4).hex()}", image)
            address = await driver.attach_block(disk)

            async def detach() -> None:
                # Gone with the VMM, or by an earlier try that failed behind it.
                with contextlib.suppress(VmmExitedError, NotFoundError):
                    await driver.detach_block(disk.id)
                self._containers.pop(container_id, None)

            async def remove() -> None:
                await self._remove_half_made(agent, container_id)

            try:
                pipeline = AsyncPipeline(agent)
                container = await self._begin_container(
                    pipeline, container_id, config, image, address, detach
                )
                await container.settle()
                self._containers[container_id] = container
                self._save()
            except BaseException as error:
                undo = AsyncUndoStack()
                undo.push("container's disk", detach)
                undo.push("container", remove)
                cause = raise_with(error, await undo.unwind())
                if cause is error:
                    raise
                raise cause from error
            return container

    async def _remove_half_made(self, agent: AsyncAgentClient, container_id: ContainerId) -> None:
        """The agent may have made it, and it holds the disk then."""
        try:
            await agent.call("RemoveContainer", messages.RemoveContainerRequest(container_id=container_id))
        except (AgentRpcError, AgentConnectionError, VmmExitedError) as error:
            _log.debug(
                "there was no container to remove",
                extra={"sandbox": self.id, "op": "sandbox.create_container", "cause": str(error)},
            )

    async def attach_block(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        discard: bool = False,
        direct: bool = False,
    ) -> BlockAttachment:
        """Give the running guest a disk, and wait until it can be used there.

        Args:
            path: A raw image or a block device of the host. A writable image is locked: only one VM can have it.
            readonly: The guest can't write, and others may have the file too.
            discard: What the guest discards is given back to the host's file system.
            direct: Reads and writes go past the host's page cache.

        Returns: Where it is, with its node in the guest.

        Raises:
            NotFoundError, InvalidConfigError, HostError: The file can't be used; nothing was made.
            UnsupportedError: The machine can't hot-plug (microvm).
            ResourceExhaustedError: No port is free.
            QmpError: The VMM refused it.
            DeadlineExceededError: The guest did not have it in ``timeouts.hotplug_s``; it was taken away again.
            InvalidStateError: The sandbox does not run, or belongs to another process.
        Blocks: until the guest has it. A failure or a cancellation leaves nothing behind.
        """
        devices = self._own_devices("attach_block")
        return await devices.attach_block(path, readonly=readonly, discard=discard, direct=direct)

    async def attach_nic(
        self, *, mac: str | None = None, netns: str | None = None, owner: int | None = None
    ) -> NicAttachment:
        """Give the running guest a network interface over a tap device that is made for it, and wait until it is there.

        The tap device is up, has no addresses and is named ``cm`` with the lowest free number. It goes with the
        attachment, and with the VMM however that ends.

        Args:
            mac: Hardware address; None: a random one.
            netns: Path of the network namespace for the tap device; None: that of this process.
            owner: User id that may open the tap device too.

        Returns: Its names in the guest and on the host.

        Raises:
            InvalidConfigError: ``mac`` can't be used; nothing was made.
            HostError: The tap device can't be made (CAP_NET_ADMIN, ``/dev/net/tun``).
            Otherwise as :meth:`attach_block`.
        Blocks: until the guest has it. A failure or a cancellation leaves nothing behind.
        """
        return await self._own_devices("attach_nic").attach_nic(mac=mac, netns=netns, owner=owner)

    async def detach(self, attachment: Attachment | str) -> None:
        """Take an attached device away, when the guest has let it go. What uses it there loses it.

        Args:
            attachment: What :meth:`attach_block` or :meth:`attach_nic` returned, or its ``id``.

        Raises:
            NotFoundError: It is not attached.
            DeadlineExceededError: The guest did not let it go in ``timeouts.hotplug_s``. It may still; ask again.
            HypervisorError: The guest refused.
            HostError: The state document can't be written; the device is gone all the same.
            InvalidStateError: The sandbox does not run, or belongs to another process.
        Blocks: until then. After a failure or a cancellation the device is attached, perhaps under another name.
        """
        device_id = attachment if isinstance(attachment, str) else attachment.id
        await self._own_devices("detach").detach(device_id)

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """Devices that were attached while it runs, in the order of their coming."""
        if self._devices is not None:
            return self._devices.attachments
        return () if self._record is None else self._record.devices

    def _own_devices(self, op: str) -> AsyncDevices | AsyncKeptDevices:
        agent = self._running_agent(op)
        if self._kept is None:
            self._own_driver(op)
        if self._state is not State.RUNNING:
            raise InvalidStateError(
                f"{op} needs a running guest, sandbox {self.id} is {self._state.value}",
                state=self._state.value,
                wanted=State.RUNNING.value,
                op=f"sandbox.{op}",
                sandbox_id=self.id,
            )
        if self._devices is None:
            self._devices = self._make_devices(agent)
        return self._devices

    def _make_devices(self, agent: AsyncAgentClient) -> AsyncDevices | AsyncKeptDevices:
        # Imported here, not above: most sandboxes never need it.
        if self._kept is not None:
            from casemate._async.kept_devices import AsyncKeptDevices

            assert self._record is not None

            def note(record: SandboxRecord) -> None:
                self._record = record

            return AsyncKeptDevices(self._kept, agent, self._record, self._timeouts, note)
        from casemate._async.devices import AsyncDevices

        details = self.guest.agent_details
        features = () if details is None else details.extra_features
        return AsyncDevices(self._own_driver("devices"), agent, features, self._written)

    async def _written(self) -> None:
        self._save()

    def _forgetting(self, container_id: ContainerId) -> Detach:
        """What remains to do when a container that was there at boot is removed: its disk stays plugged in."""

        async def forget() -> None:
            self._containers.pop(container_id, None)
            if self._kept is not None:
                await self._kept.forget(container_id)

        return forget

    def _noting(self, container_id: ContainerId) -> Changed:
        """What is to do when a container's state has changed: write it down."""

        async def note() -> None:
            if self._kept is None:
                self._save()
                return
            one = self._containers.get(container_id)
            new = None if one is None else one.record()
            self._record = await self._kept.update(lambda record: with_container(record, container_id, new))

        return note

    @property
    def state(self) -> State:
        """``ready`` while it boots, then ``running``, ``paused``, ``stopped``."""
        return self._state

    @property
    def containers(self) -> tuple[AsyncContainer, ...]:
        """Its containers, in the order of their making."""
        return tuple(self._containers.values())

    def container(self, name: str | None = None) -> AsyncContainer:
        """One container; without a name the only one. Raises: NotFoundError."""
        known = ", ".join(self._containers) or "none"
        if name is None:
            if len(self._containers) == 1:
                return next(iter(self._containers.values()))
            raise NotFoundError(
                f"sandbox {self.id} has not one container but: {known}; name one", sandbox_id=self.id
            )
        try:
            return self._containers[ContainerId(name)]
        except KeyError as error:
            raise NotFoundError(
                f"sandbox {self.id} has no container {name!r}; it has: {known}",
                sandbox_id=self.id,
                container_id=name,
            ) from error

    @property
    def timings(self) -> tuple[Phase, ...]:
        """Where the time of its start went, phase by phase."""
        return self._clock.phases

    @property
    def vmm_pid(self) -> int:
        """Process id of the VMM."""
        return self._control("vmm_pid").process.pid

    def inspect(self) -> SandboxRecord:
        """All that is known of it, as in its state document. Does not block."""
        return self._record if self._driver is None and self._record is not None else self._make_record()

    def logs(
        self,
        container: str | None = None,
        *,
        follow: bool = False,
        since_s: float | None = None,
        tail: int | None = None,
    ) -> AsyncLogReader:
        """What a container of a detached sandbox wrote, whether or not anybody was attached: an iterator over entries.

        Args:
            container: Which one; None: the only one.
            follow: Go on with what is written from now on, until the container has ended.
            since_s: Leave out what came before this time, in seconds since 1970.
            tail: At most so many lines of what is there at the begin.

        Raises: NotFoundError; InvalidStateError: The sandbox is not detached.
        Blocks: not here; the iteration reads files and with ``follow`` waits for output.
        """
        from casemate._async.logs import async_open_logs

        return async_open_logs(
            self._settings, self.inspect(), container, follow=follow, since_s=since_s, tail=tail
        )

    def events(self) -> AsyncEvents:
        """What happens to it from now on, to be iterated over: see :class:`casemate.EventKind`. Does not block.

        The first call starts the watch, which asks VMM and agent as ``config.monitor`` says; before it nobody is asked.

        Raises: InvalidStateError: It does not run, or belongs to another process.
        """
        return self._watched("events").subscribe()

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` with each event from now on; call what is returned to end that. Does not block.

        It is called by the watch itself (on the loop, or in its thread) and must not wait. Raises: as :meth:`events`.
        """
        return self._watched("on_event").call(callback)

    def _watched(self, op: str) -> AsyncMonitor:
        agent, driver = self._running_agent(op), self._own_driver(op)
        with self._saving:
            if self._monitor is None:
                self._monitor = AsyncMonitor(
                    self.id,
                    driver,
                    agent,
                    self.config.monitor,
                    timeout_factor=self._settings.timeout_factor,
                    is_paused=lambda: self._state is State.PAUSED,
                )
            return self._monitor

    async def pause(self) -> None:
        """Stop the virtual CPUs. Raises: InvalidStateError. Blocks: for the VMM's answer."""
        check_transition(self._state, State.PAUSED, op="sandbox.pause")
        await self._control("pause").pause()
        await self._move(State.PAUSED)

    async def resume(self) -> None:
        """Let the virtual CPUs run again. Raises: InvalidStateError. Blocks: for the VMM's answer."""
        if self._state is not State.PAUSED:
            check_transition(self._state, self._state, op="sandbox.resume")
        await self._control("resume").resume()
        await self._move(State.RUNNING)

    async def _move(self, state: State) -> None:
        self._state = state
        if self._kept is None:
            self._save()
        else:
            self._record = await self._kept.update(lambda record: replace(record, state=state))

    async def stop(self) -> None:
        """End the containers and the machine, remove every trace, of a detached sandbox also its keeper. Idempotent.

        Raises: what could not be undone, as an ExceptionGroup when it is more than one failure; InvalidStateError when another
            process owns it, and in a fork.
        Blocks: for the guest's and the VMM's end, at most ``timeouts.stop_s`` each.
        """
        self._check_process("stop")
        async with self._stopping:
            if self._state is not State.STOPPED:
                self._control("stop")
                # As a whole: a cancellation after the guest's end must not leave the machine.
                await compat.shielded(self._stop())

    async def _stop(self) -> None:
        failures: list[BaseException] = []
        if self._monitor is not None:
            self._monitor.request_stop()
            # Last of all: what it waits for ends with the VMM.
            self._undo.push_first("monitor", self._monitor.join)
        try:
            await self._destroy_guest()
        except GeneratorExit:
            raise
        except BaseException as error:
            failures.append(error)
        self._state = State.STOPPED
        if self._kept is not None:
            self._undo.push("keeper", self._kept.end)
        failures += await self._undo.unwind()
        if self._kept is not None:
            self._kept.close()
        self._clock.mark("teardown")
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise BaseExceptionGroup(f"sandbox {self.id} could not be removed whole", failures)

    async def aclose(self) -> None:
        """As :meth:`stop`; of a detached sandbox, and one that was attached to, only the connection is closed; in a fork nothing."""
        if self._pid != os.getpid():
            return
        if self._driver is not None:
            await self.stop()
        elif self._state is not State.STOPPED:
            self._state = State.STOPPED
            await self._undo.unwind()
            if self._kept is not None:
                self._kept.close()

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        forgotten = getattr(self, "_driver", None) is not None and self._state is not State.STOPPED
        if forgotten and self._pid == os.getpid():
            import warnings

            warnings.warn(f"sandbox {self.id} was never closed", ResourceWarning, stacklevel=1, source=self)

    async def _destroy_guest(self) -> None:
        """Let the agent end its containers and let go of what it mounted; a guest that can't is ended all the same."""
        agent = self._agent
        if agent is None or agent.connection.closed or self._state is State.PAUSED:
            return
        try:
            failpoints.hit("agent.destroy_sandbox")
            await agent.call(
                "DestroySandbox", messages.DestroySandboxRequest(), timeout_s=self._timeouts.stop_s
            )
        except CasemateError as error:
            _log.info(
                "the guest did not say goodbye",
                extra={"sandbox": self.id, "op": "sandbox.stop"},
                exc_info=error,
            )

    async def _resolve_image(
        self, config: ContainerConfig, progress: Callable[[Progress], None] | None
    ) -> Image:
        from casemate import images

        return await prepare_image(images.resolve, config.image, settings=self._settings, progress=progress)

    async def _close_agent(self) -> None:
        if self._agent is not None:
            self._agent.close()
            failpoints.hit("agent.close")

    async def _remove_directory(self) -> None:
        if self._directory is not None:
            self._directory.remove()

    def _check_process(self, op: str) -> None:
        """A fork shares the descriptors, and has none of the threads and locks' owners: what it did would harm the parent."""
        if self._pid != os.getpid():
            raise InvalidStateError(
                f"{op}: sandbox {self.id} belongs to process {self._pid}, and this is a fork of it; use attach",
                state="forked",
                wanted="owned",
                op=f"sandbox.{op}",
                sandbox_id=self.id,
            )

    def _running_agent(self, op: str) -> AsyncAgentClient:
        self._check_process(op)
        if self._agent is None or self._state is State.STOPPED:
            raise InvalidStateError(
                f"{op} needs a running sandbox, {self.id} is {self._state.value}",
                state=self._state.value,
                wanted=State.RUNNING.value,
                op=f"sandbox.{op}",
                sandbox_id=self.id,
            )
        return self._agent

    def _control(self, op: str) -> AsyncHypervisor | AsyncKept:
        return self._kept if self._kept is not None else self._own_driver(op)

    def _own_driver(self, op: str) -> AsyncHypervisor:
        self._check_process(op)
        if self._kept is not None:
            raise UnsupportedError(
                f"{op} is not possible in a detached sandbox: give it what it needs when it is made",
                capability="detached_hotplug",
                op=f"sandbox.{op}",
                sandbox_id=self.id,
            )
        if self._driver is None:
            raise InvalidStateError(
                f"{op} is for the process that owns sandbox {self.id}",
                state="attached",
                wanted="owned",
                op=f"sandbox.{op}",
                sandbox_id=self.id,
            )
        return self._driver

    def _save(self) -> None:
        # Several threads may change it: what is written last is what was seen last.
        with self._saving:
            if self._directory is not None and self._state is not State.STOPPED:
                self._directory.write(self._make_record())

    def _make_record(self) -> SandboxRecord:
        driver, assets = self._own_driver("inspect"), self._guest_assets()
        return SandboxRecord(
            id=self.id,
            state=self._state,
            created_unix_ns=self._created_unix_ns,
            owner=process_record(os.getpid()),
            hypervisor=self.config.hypervisor,
            machine=self.config.machine,
            accel=driver.accel_name,
            accel_reason=driver.accel_reason,
            vcpus=self.config.vcpus,
            memory_mib=self.config.memory_mib,
            kernel=str(assets.kernel),
            kernel_release=assets.kernel_release,
            initrd=None if assets.initrd is None else str(assets.initrd),
            keeper=None if self._keeper is None else self._keeper.record,
            vmm=self._vmm,
            agent_url=self.agent_url,
            containers=tuple(container.record() for container in self.containers),
            topology=driver.topology,
            devices=self.attachments,
        )

    def _guest_assets(self) -> GuestAssets:
        assert self._assets is not None
        return self._assets
