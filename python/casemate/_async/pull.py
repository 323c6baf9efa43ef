"""Bring an image here, ahead of the start that needs it."""

from __future__ import annotations

from collections.abc import Callable

from casemate._compat import aio as compat
from casemate.config.settings import Settings
from casemate.images import Image
from casemate.types import Progress

__all__ = ["async_pull"]


async def async_pull(
    reference: str,
    *,
    settings: Settings | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Image:
    """Bring an image here and unpack it.

    Args:
        reference: ``[docker://][HOST[:PORT]/]NAME[:TAG][@DIGEST]``, without a host from the default registry (docker.io); or a
            local reference, which is unpacked ahead.
        settings: Where things lie; None: from the environment.
        progress: Called with progress events (``download``, ``unpack``, ``pack``), from another thread in the asynchronous face;
            what it raises ends the pull.

    Raises:
        InvalidConfigError: The reference has no known form.
        NotFoundError: The registry has no such image, or nothing lies at that path.
        RegistryError: The registry can't be reached, refuses, or answers with an error.
        ImageError: The image is damaged or not of a form that can be unpacked.
        UnsupportedError, HostError, ResourceExhaustedError: This host can't unpack or hold it.
    Blocks: for the registry, and for download and unpacking of an image that is not stored yet.
    """
    from casemate import images

    return await compat.to_thread(images.pull, reference, settings=settings, progress=progress)
