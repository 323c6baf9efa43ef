"""An image in a registry as a candidate to be stored."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from casemate.config.settings import Settings
from casemate.errors import ImageError, ResourceExhaustedError
from casemate.images import documents
from casemate.images.documents import Descriptor, Index, Manifest
from casemate.images.layout import candidate_from_manifest
from casemate.images.registry.client import Document, RegistryClient
from casemate.images.registry.download import Parts, download_blob
from casemate.images.registry.name import RegistryName
from casemate.images.source import Candidate, Provided

__all__ = ["find_in_registry"]

_MAX_DEPTH = 4
_MAX_LAYERS = 500
_OLD_MANIFEST = "application/vnd.docker.distribution.manifest.v1+"


def find_in_registry(
    name: RegistryName, *, parts: Parts, reference: str, architecture: str, settings: Settings
) -> Candidate:
    """Find the image ``name``, its manifest for this platform read and checked against its digest.

    Raises:
        NotFoundError: The registry has no such image.
        RegistryError: It can't be reached, refuses, or answers with an error.
        ImageError: The image is damaged, too large, or has nothing for this platform.
    Blocks: for the answers.
    """
    client = RegistryClient(name, reference=reference, settings=settings)
    document, manifest = _get_manifest(client, name, reference=reference, architecture=architecture)
    files = _RegistryFiles(
        client, manifest, parts, reference=reference, timeout_factor=settings.timeout_factor
    )
    _check_sizes(manifest, reference=reference, max_bytes=settings.max_image_bytes)
    candidate = candidate_from_manifest(
        files,
        document.digest,
        manifest,
        name=name.text,
        reference=reference,
        architecture=architecture,
    )
    parts_of_it = tuple(documents.digest_hex(layer.digest, reference=reference) for layer in manifest.layers)
    return msgspec.structs.replace(candidate, phase="download", parts=parts_of_it)


def _get_manifest(
    client: RegistryClient, name: RegistryName, *, reference: str, architecture: str
) -> tuple[Document, Manifest]:
    """Follow indexes down to the manifest for this platform."""
    selector = name.selector
    for _ in range(_MAX_DEPTH):
        document = client.get_manifest(selector)
        index = documents.decode(
            document.data, Index, what="manifest", reference=reference, digest=document.digest
        )
        media_type = index.media_type or document.media_type
        if media_type.startswith(_OLD_MANIFEST):
            raise ImageError(
                f"image {reference!r} has a manifest of Docker's first schema; it has to be pushed again by a newer tool",
                reference=reference,
                digest=document.digest,
            )
        if media_type not in documents.INDEX_MEDIA_TYPES and not index.manifests:
            manifest = documents.decode(
                document.data, Manifest, what="manifest", reference=reference, digest=document.digest
            )
            documents.check_manifest_type(manifest, reference=reference, digest=document.digest)
            return document, manifest
        selector = documents.choose_manifest(
            index, architecture=architecture, reference=reference, digest=document.digest
        ).digest
        documents.digest_hex(selector, reference=reference)
    raise ImageError(f"image {reference!r} nests more than {_MAX_DEPTH} indexes", reference=reference)


class _RegistryFiles:
    """Blobs of one image, by the names that they have in a layout."""

    __slots__ = ("_blobs", "_client", "_factor", "_parts", "_reference")

    def __init__(
        self,
        client: RegistryClient,
        manifest: Manifest,
        parts: Parts,
        *,
        reference: str,
        timeout_factor: float,
    ) -> None:
        self._factor = timeout_factor
        self._client = client
        self._parts = parts
        self._reference = reference
        self._blobs: dict[str, Descriptor] = {}
        for blob in (manifest.config, *manifest.layers):
            self._blobs[f"blobs/sha256/{documents.digest_hex(blob.digest, reference=reference)}"] = blob

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """A small blob. Raises RegistryError when larger than ``max_bytes``."""
        blob = self._blobs.get(name)
        return None if blob is None else self._client.get_blob(blob.digest, max_bytes=max_bytes)

    def size_bytes(self, name: str) -> int | None:
        """What the manifest says; the download is held to it."""
        blob = self._blobs.get(name)
        return None if blob is None else blob.size

    def provide(self, name: str, directory: Path, report: Callable[[int], None]) -> Provided | None:
        """The blob, downloaded."""
        blob = self._blobs.get(name)
        if blob is None:
            return None
        path = directory / name.rpartition("/")[2]
        # Images have the same layer twice, the empty one most of all.
        if not path.exists():
            _check_space(blob, directory, reference=self._reference)
            download_blob(
                self._client,
                self._parts,
                blob,
                path,
                report,
                reference=self._reference,
                timeout_factor=self._factor,
            )
        return Provided(path=path, size_bytes=blob.size)


def _check_sizes(manifest: Manifest, *, reference: str, max_bytes: int) -> None:
    """Before the first byte: what is promised must be something this host would take."""
    if len(manifest.layers) > _MAX_LAYERS:
        raise ImageError(
            f"image {reference!r} has {len(manifest.layers)} layers, at most {_MAX_LAYERS} are expected",
            reference=reference,
        )
    for blob in (manifest.config, *manifest.layers):
        if blob.size < 0:
            raise ImageError(
                f"blob {blob.digest} of image {reference!r} has no size in the manifest",
                reference=reference,
                digest=blob.digest,
            )
    total_bytes = sum(blob.size for blob in manifest.layers)
    if total_bytes > max_bytes:
        raise ImageError(
            f"the layers of image {reference!r} have {total_bytes} bytes, at most {max_bytes} are expected",
            reference=reference,
        )


def _check_space(blob: Descriptor, directory: Path, *, reference: str) -> None:
    status = os.statvfs(directory)
    free_bytes = status.f_bavail * status.f_frsize
    if blob.size > free_bytes:
        raise ResourceExhaustedError(
            f"layer {blob.digest} of image {reference!r} has {blob.size} bytes, {free_bytes} are free in {directory}"
        )
