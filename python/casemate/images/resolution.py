"""From a reference to an image that can be attached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from casemate.config.settings import Settings
from casemate.errors import ImageError, NotFoundError
from casemate.images import layout
from casemate.images.reference import Reference, is_name, parse_reference
from casemate.images.source import Candidate, DirectoryFiles, Files
from casemate.images.store import Store
from casemate.images.types import Image, ReportProgress

__all__ = ["list_images", "remove", "resolve"]

# What the guest kernels and agents that we have are made for.
_ARCHITECTURE = "amd64"


def resolve(reference: str, *, settings: Settings, progress: ReportProgress | None = None) -> Image:
    """The image that ``reference`` names, unpacked when it is not yet.

    Args:
        reference: ``oci:PATH[:TAG]``, ``oci-archive:PATH[:TAG]``, ``docker-archive:PATH[:TAG]``, the path of any of these,
            or the name or digest of a stored image.
        progress: Told about every 50 ms how far it is; what it raises ends the call.

    Raises:
        InvalidConfigError: The reference has no known form.
        NotFoundError: No such path, tag or stored image.
        ImageError: The image is damaged, cut short, or of a form that can't be unpacked. Nothing is left behind.
        UnsupportedError: It has to be unpacked and this is not root, or the host can't make a filesystem.
        HostError, ResourceExhaustedError: The host can't hold it.
    Blocks: about 1 ms for an image that is stored; else for unpacking.
    """
    parsed = parse_reference(reference)
    store = Store(settings)
    if parsed.kind == "any" and not Path(parsed.path).exists():
        return _stored(store, parsed)
    with contextlib.ExitStack() as stack:
        try:
            candidate = stack.enter_context(_found(parsed))
        except ImageError:
            # A file or directory that only happens to have an image's name.
            image = store.find(parsed.text) if parsed.kind == "any" and is_name(parsed.text) else None
            if image is None:
                raise
            return image
        store.sweep()
        record = store.load(candidate.digest)
        if record is None:
            # Here, not above: what it needs is not needed for an image that is stored.
            from casemate.images.unpack import store_image

            record = store_image(store, candidate, reference=reference, settings=settings, progress=progress)
        store.set_name(candidate.name, candidate.digest)
        return store.image(record, candidate.name)


def list_images(settings: Settings) -> list[Image]:
    """The stored images, once for each name, sorted by name. Blocks: for small reads."""
    return Store(settings).images()


def remove(reference: str, settings: Settings) -> None:
    """Take away a name, and the image with its last name; by digest, the image with all its names.

    Raises:
        NotFoundError: No such stored image.
    Blocks: for another process that works on the same image, and for the removal.
    """
    Store(settings).remove(reference)


def _stored(store: Store, parsed: Reference) -> Image:
    image = store.find(parsed.text) if is_name(parsed.text) else None
    if image is None:
        raise store.unknown(parsed.text)
    return image


@contextlib.contextmanager
def _found(parsed: Reference) -> Iterator[Candidate]:
    """The image at a path, by the reference's kind or, for ``any``, by content."""
    path = Path(parsed.path)
    if parsed.kind == "oci" or (parsed.kind == "any" and path.is_dir()):
        if not path.exists():
            raise NotFoundError(f"image layout {parsed.path!r} does not exist")
        if not path.is_dir():
            raise ImageError(
                f"image layout {parsed.path!r} is not a directory; for a file take oci-archive: or docker-archive:",
                reference=parsed.text,
            )
        yield _in_layout(DirectoryFiles(path, reference=parsed.text), parsed)
        return
    from casemate.images import archive

    with archive.opened_archive(path, reference=parsed.text) as files:
        if parsed.kind == "oci-archive" or (parsed.kind == "any" and layout.MARKER in files):
            yield _in_layout(files, parsed)
        elif parsed.kind == "docker-archive" or archive.DOCKER_MANIFEST in files:
            yield archive.find_in_docker_archive(
                files, path=parsed.path, tag=parsed.tag, reference=parsed.text, architecture=_ARCHITECTURE
            )
        else:
            raise ImageError(
                f"file {parsed.path!r} is a tar file with neither {layout.MARKER} nor {archive.DOCKER_MANIFEST}: "
                "not an image archive",
                reference=parsed.text,
            )


def _in_layout(files: Files, parsed: Reference) -> Candidate:
    return layout.find_in_layout(
        files, path=parsed.path, tag=parsed.tag, reference=parsed.text, architecture=_ARCHITECTURE
    )
