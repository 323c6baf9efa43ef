# Made by scripts/unasync.py from python/casemate/_async/guest.py; do not edit.
"""What is sent into a guest to make a container there, and what that needs of the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from casemate._sync.agent import AgentClient, Pipeline
from casemate._sync.container import Container, Changed, Detach
from casemate._sync.pull import prepare_image
from casemate.agent import messages
from casemate.agent.spec import build_spec, build_storages
from casemate.config.container import ContainerConfig
from casemate.config.settings import Settings
from casemate.errors import AgentConnectionError, AgentRpcError, VmmExitedError
from casemate.hypervisor import BlockAddress, BlockDevice
from casemate.observe.log import Log
from casemate.persist.record import ContainerRecord
from casemate.types import ContainerId, Progress, State

if TYPE_CHECKING:
    from casemate.images import Image

__all__ = ["begin_container", "image_disk", "kept_disk", "remove_half_made", "resolve_image", "steps"]

_log = Log(__name__)


def begin_container(
    pipeline: Pipeline,
    container_id: ContainerId,
    config: ContainerConfig,
    image: Image,
    address: BlockAddress,
    *,
    hostname: str,
    changed: Changed,
    detach: Detach | None,
    kept: bool,
) -> Container:
    """Send the request that makes a container; :meth:`Container.settle` takes the answer.

    Args:
        address: Where the guest finds its root file system.
        hostname: Of the container, unless its configuration names one.
        changed: Called when its state has changed.
        detach: Lets go of its disk when it is removed.
        kept: A keeper reads its output.
    """
    from casemate.agent.process import container_process

    process = container_process(image, config)
    record = ContainerRecord(
        id=container_id,
        image=image.name,
        image_digest=image.digest,
        process=process,
        state=State.READY,
        created_unix_ns=time.time_ns(),
    )
    container = Container(pipeline.agent, record, image=image, changed=changed, kept=kept)
    spec = build_spec(
        container_id,
        process,
        hostname=config.hostname or hostname,
        readonly_rootfs=config.readonly_rootfs,
        annotations=config.annotations,
    )
    driver, source = (
        ("blk", address.pci_path) if address.pci_path else ("mmioblk", f"serial={address.serial}")
    )
    storages = build_storages(container_id, driver=driver, source=source, fstype=image.fstype)
    container.begin_create(pipeline, spec, storages, detach)
    return container


def remove_half_made(agent: AgentClient, sandbox_id: str, container_id: ContainerId) -> None:
    """Undo a making whose outcome is not known: the agent may have the container, and it holds the disk then."""
    try:
        agent.call("RemoveContainer", messages.RemoveContainerRequest(container_id=container_id))
    except (AgentRpcError, AgentConnectionError, VmmExitedError) as error:
        _log.debug(
            "there was no container to remove",
            extra={"sandbox": sandbox_id, "op": "sandbox.create_container", "cause": str(error)},
        )


def resolve_image(
    config: ContainerConfig, settings: Settings, progress: Callable[[Progress], None] | None
) -> Image:
    """The image that a container is made from. Blocks: for its unpacking when that was not done before."""
    from casemate import images

    return prepare_image(images.resolve, config.image, settings=settings, progress=progress)


def steps(progress: Callable[[Progress], None] | None) -> Callable[[str, int, int], None] | None:
    """``progress`` as the making of guest assets calls it."""
    if progress is None:
        return None

    def step(phase: str, done_bytes: int, total_bytes: int) -> None:
        progress(Progress(phase=phase, done_bytes=done_bytes, total_bytes=total_bytes))

    return step


def image_disk(name: str, image: Image) -> BlockDevice:
    """An image's root file system as a disk named ``name``, shared and read-only."""
    return BlockDevice(id=name, path=str(image.rootfs), read_only=True, serial=name)


def kept_disk(container_id: str, image: Image | None) -> BlockDevice:
    """The disk of a later container of a detached sandbox: its name tells any process whose it is."""
    import hashlib  # here: 6 ms that no other start needs

    name = f"rootfs-{hashlib.blake2s(container_id.encode(), digest_size=6).hexdigest()}"
    path = "/dev/null" if image is None else str(image.rootfs)
    return BlockDevice(id=name, path=path, read_only=True, serial=name)
