"""From a reference to an image that can be attached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from casemate.config.settings import Settings
from casemate.errors import ImageError, InvalidStateError, NotFoundError, ResourceExhaustedError
from casemate.images import layout
from casemate.images.reference import Reference, is_name, parse_reference
from casemate.images.source import Candidate, DirectoryFiles, Files
from casemate.images.store import Store
from casemate.images.types import Image, ReportProgress
from casemate.observe import failpoints

__all__ = ["PullPolicy", "list_images", "pull", "remove", "resolve"]

PullPolicy = Literal["missing", "always", "never"]
"""When a registry is asked: for an image that is not stored, each time, or not at all."""

# What the guest kernels and agents that we have are made for.
_ARCHITECTURE = "amd64"


def resolve(
    reference: str,
    *,
    settings: Settings,
    progress: ReportProgress | None = None,
    pull_policy: PullPolicy = "missing",
) -> Image:
    """The image that ``reference`` names, unpacked when it is not yet.

    Only ``docker://`` asks a registry: a bare name is a path or a stored image, whoever pulled it.

    Args:
        reference: ``docker://NAME``, ``oci:PATH[:TAG]``, ``oci-archive:PATH[:TAG]``, ``docker-archive:PATH[:TAG]``, the path of an
            image, or the name or digest of a stored one.
        progress: Told about every 50 ms how far it is; what it raises ends the call.
        pull_policy: When the registry is asked for a ``docker://`` reference.

    Raises:
        InvalidConfigError: The reference has no known form.
        NotFoundError: No such path, tag, stored image, or image in the registry.
        RegistryError: The registry can't be reached, refuses, or answers with an error.
        ImageError: The image is damaged, cut short, or of a form that can't be unpacked. Nothing is left behind.
        UnsupportedError: It has to be unpacked and this is not root, or the host can't make a filesystem.
        HostError, ResourceExhaustedError: The host can't hold it.
    Blocks: about 1 ms for an image that is stored; else for the download and for unpacking.
    """
    parsed = parse_reference(reference)
    store = Store(settings)
    if parsed.kind == "docker":
        return _from_registry(store, parsed, settings, progress, pull_policy)
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
            return _used(store, image, parsed.text)
        return _put(store, candidate, reference=reference, settings=settings, progress=progress)


def pull(
    reference: str, *, settings: Settings | None = None, progress: ReportProgress | None = None
) -> Image:
    """Bring an image here and unpack it: from a registry, which is always asked, or from where a local reference points.

    Args:
        reference: As for :func:`resolve`; a bare name that is no path means one in a registry here.
        settings: Where things lie; None: from the environment.
        progress: As for :func:`resolve`.

    Raises: as :func:`resolve`.
    Blocks: for the registry's answer; for the download and the unpacking when that image is not stored yet.
    """
    settings = settings if settings is not None else Settings.from_environment()
    failpoints.arm_from_settings(settings.failpoints)
    parsed = parse_reference(reference)
    if parsed.kind == "any" and not Path(parsed.path).exists():
        reference = f"docker://{reference}"
    return resolve(reference, settings=settings, progress=progress, pull_policy="always")


def list_images(settings: Settings) -> list[Image]:
    """The stored images, once for each name, sorted by name. Blocks: for small reads."""
    return Store(settings).images()


def remove(reference: str, settings: Settings, *, force: bool = False) -> None:
    """Take away a name, and the image with its last name; by digest, the image with all its names.

    Args:
        force: Also when a sandbox uses it: the sandbox keeps the file that it has open.

    Raises:
        NotFoundError: No such stored image.
        InvalidStateError: A sandbox uses it, and without this name it would go.
        HostError: It can't be removed.
    Blocks: for another process that works on the same image, and for the removal.
    """
    failpoints.arm_from_settings(settings.failpoints)
    store = Store(settings)
    if not force:
        image = store.find(reference)
        users = () if image is None else _users(store, image, settings)
        if image is not None and users:
            raise InvalidStateError(
                f"image {reference!r} is used by sandbox {', '.join(users)}; remove that first, or force it",
                state="used",
                wanted="unused",
            )
    store.remove(reference)


def _users(store: Store, image: Image, settings: Settings) -> tuple[str, ...]:
    from casemate.images.collection import find_users

    names = [name for name, digest in store.names().items() if digest == image.digest]
    return find_users(settings).get(image.digest, ()) if len(names) <= 1 else ()


def _from_registry(
    store: Store, parsed: Reference, settings: Settings, progress: ReportProgress | None, policy: PullPolicy
) -> Image:
    from casemate.images.registry.name import parse_name

    name = parse_name(parsed.path, default_registry=settings.default_registry)
    if policy != "always":
        image = store.find(name.text)
        if image is not None:
            return _used(store, image, name.text)
        if policy == "never":
            raise store.unknown(name.text)
    # Only here: http and ssl take longer to import than the rest of a start together.
    from casemate.images.registry.source import find_in_registry

    candidate = find_in_registry(
        name, parts=store, reference=parsed.text, architecture=_ARCHITECTURE, settings=settings
    )
    try:
        image = _put(store, candidate, reference=parsed.text, settings=settings, progress=progress)
    except ResourceExhaustedError:
        # The disk is full, and others want the room more than the next try wants a start.
        store.remove_parts(only=candidate.parts)
        raise
    store.remove_parts(only=candidate.parts)
    return image


def _put(
    store: Store, candidate: Candidate, *, reference: str, settings: Settings, progress: ReportProgress | None
) -> Image:
    store.sweep()
    record = store.use(candidate.digest)
    if record is None:
        # Here, not above: what it needs is not needed for an image that is stored.
        from casemate.images.unpack import store_image

        record = store_image(store, candidate, reference=reference, settings=settings, progress=progress)
    store.set_name(candidate.name, candidate.digest)
    return store.image(record, candidate.name)


def _stored(store: Store, parsed: Reference) -> Image:
    image = store.find(parsed.text) if is_name(parsed.text) else None
    if image is None:
        raise store.unknown(parsed.text)
    return _used(store, image, parsed.text)


def _used(store: Store, image: Image, text: str) -> Image:
    """The image, marked as used now."""
    if store.use(image.digest) is None:
        raise store.unknown(text)
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
