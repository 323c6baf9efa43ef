"""A driver without a VMM's options: every call succeeds, is noted, and a fake VMM runs. For tests of what is built on drivers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from casemate import _core
from casemate._compat import aio as compat
from casemate.agent.transport import HybridTransport, Transport
from casemate.config.sandbox import SandboxConfig
from casemate.errors import (
    DeadlineExceededError,
    InvalidStateError,
    VmmExitedError,
)
from casemate.hypervisor import (
    BlockAddress,
    BlockDevice,
    Capabilities,
    GuestAssets,
    NicDevice,
    PluggedDevice,
    VmmProcess,
    fake,
)
from casemate.hypervisor.pci import Bridge, BridgeKind, PciAddress, Topology

if TYPE_CHECKING:
    from casemate._async.transaction import Performer
    from casemate.keeper.birth import NewKeeper
    from casemate.keeper.vmm import KeptVmm

__all__ = ["AsyncMockHypervisor"]

VSOCK_SOCKET = "vsock.sock"
_END_S = 5.0
_TAIL_S = 0.5


class AsyncMockHypervisor:
    """One fake VM.

    Attributes:
        calls: Names of the calls in the order they came, with what was named in them.
    """

    __slots__ = (
        "_assets",
        "_config",
        "_directory",
        "_keeper",
        "_plugged",
        "_process",
        "_sandbox_id",
        "_stop_lock",
        "calls",
        "changed",
        "topology",
    )

    accel_name = "none"
    accel_reason = "the VMM is a fake"

    def __init__(self, config: SandboxConfig, *, sandbox_id: str) -> None:
        self.calls: list[str] = []
        self._config = config
        self._sandbox_id = sandbox_id
        self._assets: GuestAssets | None = None
        self._directory: Path | None = None
        self._keeper: NewKeeper | None = None
        self._process: _core.ChildProcess | KeptVmm | None = None
        self._plugged: dict[str, PluggedDevice] = {}
        self.topology = Topology(bridges=tuple(map(_port, range(config.root_ports))))
        self.changed: Callable[[], compat.Later[None]] = _nothing
        self._stop_lock = compat.Lock()

    @property
    def capabilities(self) -> Capabilities:
        """What this VM can do."""
        return Capabilities(
            block_hotplug=self._config.root_ports > 0,
            network_hotplug=self._config.root_ports > 0,
            vcpu_hotplug=False,
            memory_hotplug=False,
            pause=True,
            pci=True,
            max_vcpus=self._config.vcpus,
        )

    @property
    def process(self) -> _core.ChildProcess | KeptVmm:
        """The fake VMM. Raises: InvalidStateError before :meth:`start`."""
        if self._process is None:
            raise InvalidStateError("the VMM was not started", state="planned", wanted="running")
        return self._process

    def plan(self, assets: GuestAssets, disks: Sequence[BlockDevice] = ()) -> tuple[BlockAddress, ...]:
        """Decide where each of ``disks`` is found. Makes nothing, does not block."""
        self._note("plan")
        self._assets = assets
        return tuple(
            BlockAddress(id=disk.id, pci_path=f"{slot:02x}", serial=disk.serial)
            for slot, disk in enumerate(disks, 3)
        )

    def launch_with(self, keeper: NewKeeper) -> None:
        """Let ``keeper`` start the fake, which serves its vsock socket itself."""
        self._note("launch_with")
        self._keeper = keeper

    def hand_over(self) -> None:
        """Forget the process."""
        self._note("hand_over")

    async def prepare(self, directory: Path) -> Transport:
        """Choose the socket in ``directory``. Raises: InvalidStateError without a plan, or twice."""
        self._note("prepare")
        if self._assets is None or self._directory is not None:
            raise InvalidStateError("prepare comes once, after plan", state="new", wanted="planned")
        self._directory = directory
        return HybridTransport(directory / VSOCK_SOCKET)

    async def start(self) -> VmmProcess:
        """Start the fake VMM. Raises: HostError, InvalidStateError. Blocks: for fork and exec."""
        self._note("start")
        if self._assets is None or self._directory is None or self._process is not None:
            raise InvalidStateError("start comes once, after prepare", state="new", wanted="prepared")
        socket_path = str(self._directory / VSOCK_SOCKET)
        words = ("-hybrid", socket_path, "-append", " ".join(self._assets.parameters))
        command = [*fake.command(), *words, *self._config.qemu_arguments]
        if self._keeper is None:
            self._process = _core.spawn(command)
        else:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                self._process = await compat.to_thread(
                    self._keeper.spawn,
                    command,
                    fds=(),
                    console_fd=ours.fileno(),
                    vsock=None,
                    timeout_s=_END_S,
                )
        return VmmProcess(pid=self._process.pid, start_time_ticks=self._process.start_time_ticks)

    async def exit_error(self, wait_s: float = 1.0) -> VmmExitedError | None:
        """Why it ended; None when it has not within ``wait_s``. Blocks: until then."""
        process = self.process
        if process.exit_status() is None:
            await compat.wait_readable([process.fileno()], time.monotonic() + wait_s)
        try:
            # Seen ending is not yet reaped.
            status = await compat.to_thread(process.wait, _TAIL_S)
        except DeadlineExceededError:
            return None
        cause = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        tail = process.stderr_tail().decode("utf-8", "replace")
        return VmmExitedError(
            f"the fake VMM ended: {cause}", status=status, log_tail=tail, sandbox_id=self._sandbox_id
        )

    async def pause(self) -> None:
        """Let the process stand still: so does its guest. Does not block."""
        self._note("pause")
        self._signal(signal.SIGSTOP)

    async def resume(self) -> None:
        """Let it go on. Does not block."""
        self._note("resume")
        self._signal(signal.SIGCONT)

    async def check(self, timeout_s: float) -> None:
        """Whether it has not ended. Raises: VmmExitedError. Does not block."""
        if self.process.exit_status() is not None:
            raise VmmExitedError("the fake VMM has ended", status=self.process.exit_status())

    @property
    def plugged(self) -> tuple[PluggedDevice, ...]:
        """What was attached, in the order of its coming."""
        return tuple(self._plugged.values())

    async def attach(self, device: BlockDevice | NicDevice, ask: Performer | None = None) -> PluggedDevice:
        """Note a device behind a free port; the guest is not asked.

        Raises:
            AlreadyExistsError: One of that name is attached.
            ResourceExhaustedError: All ports are taken.
        """
        self._note(f"attach {device.id}")
        self.topology, place = self.topology.allocate(device.id)
        await self.changed()
        self._plugged[device.id] = PluggedDevice(device=device, pci_path=place.path)
        return self._plugged[device.id]

    async def detach(self, device_id: str, ask: Performer | None = None) -> None:
        """Forget a device. Raises: NotFoundError."""
        self._note(f"detach {device_id}")
        self.topology = self.topology.release(device_id)
        del self._plugged[device_id]
        await self.changed()

    async def attach_block(self, disk: BlockDevice) -> BlockAddress:
        """As :meth:`attach`."""
        plugged = await self.attach(disk)
        return BlockAddress(id=disk.id, pci_path=plugged.pci_path, serial=disk.serial)

    async def detach_block(self, disk_id: str) -> None:
        """As :meth:`detach`."""
        await self.detach(disk_id)

    async def stop(self) -> None:
        """End the process and remove its socket. Idempotent. Raises: DeadlineExceededError. Blocks: until it ended."""
        async with self._stop_lock:
            self._note("stop")
            process = self._process
            if process is not None and process.exit_status() is None:
                process.send_signal(signal.SIGKILL)
                if not await compat.wait_readable([process.fileno()], time.monotonic() + _END_S):
                    raise DeadlineExceededError(
                        f"the fake VMM (pid {process.pid}) did not end within {_END_S:g} s after SIGKILL",
                        deadline_s=_END_S,
                        waited_s=_END_S,
                        op="mock.stop",
                        sandbox_id=self._sandbox_id,
                    )
            if self._directory is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._directory / VSOCK_SOCKET)

    def _signal(self, number: signal.Signals) -> None:
        if not self.process.send_signal(number):
            raise VmmExitedError("the fake VMM has ended", status=self.process.exit_status())

    def _note(self, call: str) -> None:
        self.calls.append(call)


def _port(number: int) -> Bridge:
    return Bridge(id=f"rp{number}", kind=BridgeKind.ROOT_PORT, address=str(PciAddress(15 + number)))


async def _nothing() -> None:
    """Nobody wants to know."""
