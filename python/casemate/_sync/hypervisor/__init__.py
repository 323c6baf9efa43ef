# Made by scripts/unasync.py from python/casemate/_async/hypervisor/__init__.py; do not edit.
"""Hypervisor drivers: one VM each, from its plan to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from casemate import _core
from casemate._compat import blocking as compat
from casemate.agent.transport import Transport
from casemate.errors import VmmExitedError
from casemate.hypervisor import (
    BlockAddress,
    BlockDevice,
    Capabilities,
    GuestAssets,
    NicDevice,
    PluggedDevice,
    VmmProcess,
)
from casemate.hypervisor.pci import Topology

if TYPE_CHECKING:
    from casemate._sync.transaction import Performer
    from casemate.keeper.birth import NewKeeper
    from casemate.keeper.vmm import KeptVmm

__all__ = ["Hypervisor"]


class Hypervisor(Protocol):
    """What a sandbox needs of a driver. The steps of a start are called in the order in which they stand here.

    Attributes:
        changed: Called when a place of :attr:`topology` is taken, before anything is made, or given back.
    """

    changed: Callable[[], compat.Later[None]]

    @property
    def capabilities(self) -> Capabilities:
        """What this VM can do."""

    @property
    def accel_name(self) -> str:
        """The accelerator that was chosen."""

    @property
    def accel_reason(self) -> str:
        """Why."""

    def plan(self, assets: GuestAssets, disks: Sequence[BlockDevice]) -> tuple[BlockAddress, ...]:
        """Decide on everything and check it; say where the guest finds each disk. Makes nothing, does not block."""

    def launch_with(self, keeper: NewKeeper) -> None:
        """Let ``keeper`` start the VMM, so that it outlives this process; comes before :meth:`prepare`. Raises: UnsupportedError."""

    def hand_over(self) -> None:
        """Forget the VMM: it is its keeper's now. Nothing is ended or removed."""

    def prepare(self, directory: Path) -> Transport:
        """Make sockets in ``directory`` and whatever must be there before the VMM; say how the agent is reached."""

    def start(self) -> VmmProcess:
        """Start the VMM. It runs when this returns; whether it accepts its plan shows later."""

    @property
    def process(self) -> _core.ChildProcess | KeptVmm:
        """The VMM, to be watched by everyone who waits on the guest."""

    def exit_error(self, wait_s: float = 1.0) -> VmmExitedError | None:
        """Why the VMM ended; None when it has not within ``wait_s``."""

    def pause(self) -> None:
        """Stop the vCPUs."""

    def resume(self) -> None:
        """Let the vCPUs go on."""

    def check(self, timeout_s: float) -> None:
        """Ask the VMM whether its guest runs. Raises: HypervisorError, DeadlineExceededError."""

    @property
    def topology(self) -> Topology:
        """The places for later devices, and what has them."""

    @property
    def plugged(self) -> tuple[PluggedDevice, ...]:
        """What was plugged in while it runs."""

    def attach(self, device: BlockDevice | NicDevice, ask: Performer | None = None) -> PluggedDevice:
        """Plug in a device; with ``ask`` the guest is asked whether it has it."""

    def detach(self, device_id: str, ask: Performer | None = None) -> None:
        """Take a device away when the guest has let it go."""

    def attach_block(self, disk: BlockDevice) -> BlockAddress:
        """Plug in a disk; say where the guest finds it."""

    def detach_block(self, disk_id: str) -> None:
        """Unplug a disk when the guest has let it go."""

    def stop(self) -> None:
        """End the VMM and remove what :meth:`prepare` made. Idempotent, also after a failed step."""
