"""What a guest is told on its kernel command line. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from casemate.guest.parameters import kernel_parameters
from casemate.hypervisor import GuestAssets

if TYPE_CHECKING:
    from casemate import guest
    from casemate.config.sandbox import SandboxConfig

__all__ = ["boot_assets"]


def boot_assets(
    config: SandboxConfig,
    assets: guest.GuestAssets,
    accel: str,
    *,
    host_port: int,
    tsc_khz: int | None = None,
) -> GuestAssets:
    """The files of ``assets`` with the kernel's parameters: ours for machine and accelerator, the agent's, then the user's.

    Args:
        tsc_khz: Rate of the host's time stamp counter, for an emulated guest.
    """
    parameters = [
        *kernel_parameters(
            config.machine,
            accel,
            max_vcpus=config.max_vcpus or config.vcpus,
            debug=config.debug,
            tsc_khz=tsc_khz,
        ),
        f"casemate.host_port={host_port}",
        *(("agent.log=debug",) if config.debug else ()),
        *config.kernel_parameters,
    ]
    return GuestAssets(
        kernel=str(assets.kernel),
        initrd=None if assets.initrd is None else str(assets.initrd),
        image=None if assets.image is None else str(assets.image),
        parameters=tuple(parameters),
    )
