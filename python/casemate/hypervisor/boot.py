"""What a guest is told on its kernel command line. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from casemate.guest.parameters import kernel_parameters
from casemate.hypervisor import GuestAssets

if TYPE_CHECKING:
    from casemate import guest
    from casemate.config.sandbox import SandboxConfig

__all__ = ["boot_assets"]


_IMAGE_ROOT = (
    "root=/dev/vda1",
    "rootflags=data=ordered,errors=remount-ro",
    "ro",
    "rootfstype=ext4",
    "systemd.unit=kata-containers.target",
    "systemd.mask=systemd-networkd.service",
    "systemd.mask=systemd-networkd.socket",
)
"""How the reference system's images are booted (spec KP-02, KP-07): the first partition of the first disk, their agent as the one goal."""


def _root(config: SandboxConfig, assets: guest.GuestAssets) -> tuple[str, ...]:
    if assets.image is None or any(word.startswith("root=") for word in config.kernel_parameters):
        return ()
    return _IMAGE_ROOT


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
            root=_root(config, assets),
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
