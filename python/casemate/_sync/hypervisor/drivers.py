# Made by scripts/unasync.py from python/casemate/_async/hypervisor/drivers.py; do not edit.
"""The driver that a configuration names, and the guest that goes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from casemate._sync.hypervisor import Hypervisor
from casemate._sync.hypervisor.qemu import Qemu
from casemate._compat import blocking as compat

if TYPE_CHECKING:
    from casemate.config.sandbox import SandboxConfig
    from casemate.config.settings import Settings
    from casemate.guest import GuestAssets

__all__ = ["make_driver"]


def make_driver(
    config: SandboxConfig,
    settings: Settings,
    *,
    sandbox_id: str,
    progress: Callable[[str, int, int], None] | None,
    on_trial: bool = False,
) -> tuple[Hypervisor, GuestAssets]:
    """The driver for ``config`` and the files that its guest boots from. Makes nothing but cache entries.

    Args:
        on_trial: Take the accelerator that ``config`` names, whatever is known of it.

    Raises: as :meth:`Qemu.create` and ``guest.resolve``.
    Blocks: for file reads; the first time with a kernel for its making.
    """
    from casemate import guest

    if config.hypervisor == "mock":
        from casemate._sync.hypervisor.mock import MockHypervisor

        nothing = guest.GuestAssets(
            kernel=Path("/dev/null"),
            initrd=None,
            kernel_release="",
            kernel_source="none: the guest is a fake",
            initrd_bytes=0,
            modules=(),
            agent="casemate",
        )
        return MockHypervisor(config, sandbox_id=sandbox_id), nothing
    driver = Qemu.create(config, settings, sandbox_id=sandbox_id, on_trial=on_trial)
    assets = compat.to_thread(
        guest.resolve,
        config.kernel,
        config.initrd,
        image=config.image,
        machine=config.machine,
        settings=settings,
        progress=progress,
    )
    return driver, assets
