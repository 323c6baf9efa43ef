# Made by scripts/unasync.py from python/casemate/_async/pull.py; do not edit.
"""Bring an image here, ahead of the start that needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from casemate._compat import blocking as compat
from casemate.config.settings import Settings
from casemate.types import Progress

if TYPE_CHECKING:
    from casemate.images import Image

__all__ = ["pull", "prepare_image"]


def pull(
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

    return prepare_image(images.pull, reference, settings=settings, progress=progress)


def prepare_image(
    prepare: Callable[..., Image],
    reference: str,
    *,
    settings: Settings | None,
    progress: Callable[[Progress], None] | None,
) -> Image:
    """Call ``prepare``, which is told of a cancellation at its next progress event and then undoes itself."""
    cancelled = False

    def report(event: Progress) -> None:
        if cancelled:
            raise InterruptedError(f"preparing image {reference!r} was cancelled")
        if progress is not None:
            progress(event)

    try:
        return compat.to_thread(prepare, reference, settings=settings, progress=report)
    except BaseException:
        cancelled = True
        raise
