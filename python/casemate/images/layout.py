"""OCI image layouts, in a directory or an archive: from index.json to the layers of one image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from casemate.errors import ImageError, NotFoundError
from casemate.images import documents
from casemate.images.documents import ConfigDocument, Descriptor, Index, LayoutMarker, Manifest
from casemate.images.reference import default_name
from casemate.images.source import Candidate, Files, LayerFile, Plan, shifted

__all__ = ["MARKER", "candidate_from_manifest", "find_in_layout"]

MARKER = "oci-layout"
_MAX_DEPTH = 4


def find_in_layout(
    files: Files, *, path: str, tag: str | None, reference: str, architecture: str
) -> Candidate:
    """Find the image ``tag`` (or the only one), its manifest read and checked against its digest.

    Raises:
        NotFoundError: No such tag, or several images and no tag; the text names those there are.
        ImageError: The layout is damaged, or has nothing for this platform.
    Blocks: for small reads.
    """
    marker = documents.decode(
        _read(files, MARKER, reference=reference), LayoutMarker, what=MARKER, reference=reference
    )
    if not marker.image_layout_version.startswith("1."):
        raise ImageError(
            f"image {reference!r} has layout version {marker.image_layout_version!r}, 1.x is expected",
            reference=reference,
        )
    index = documents.decode(
        _read(files, "index.json", reference=reference), Index, what="index.json", reference=reference
    )
    descriptor, name = _choose(index, path=path, tag=tag, reference=reference, architecture=architecture)
    descriptor, manifest = _manifest(files, descriptor, reference=reference, architecture=architecture)

    return candidate_from_manifest(
        files,
        descriptor.digest,
        manifest,
        name=default_name(path, name),
        reference=reference,
        architecture=architecture,
    )


def candidate_from_manifest(
    files: Files, digest: str, manifest: Manifest, *, name: str, reference: str, architecture: str
) -> Candidate:
    """The image of a manifest that was checked, its blobs in ``files``. Does not block."""

    def prepare(directory: Path, report: Callable[[int, int], None]) -> Plan:
        return _prepare(
            files, digest, manifest, directory, report, reference=reference, architecture=architecture
        )

    return Candidate(digest=digest, name=name, prepare=prepare)


def _choose(
    index: Index, *, path: str, tag: str | None, reference: str, architecture: str
) -> tuple[Descriptor, str | None]:
    """The descriptor of a tag, and the tag."""
    candidates = documents.choose_descriptors(index, architecture=architecture)
    if not candidates:
        raise ImageError(
            f"image {reference!r} has nothing for linux/{architecture}: its index lists "
            f"{documents.platforms_of(index)}",
            reference=reference,
        )
    named = [(name, descriptor) for descriptor in candidates for name in documents.names_of(descriptor)]
    known = tuple(dict.fromkeys(name for name, _ in named))
    if tag is not None:
        for name, descriptor in named:
            if tag in (name, name.rpartition(":")[2]):
                return descriptor, name
        raise NotFoundError(
            f"{path} has no image {tag!r} for linux/{architecture}; it has "
            + (", ".join(known[:20]) if known else "one without a name: leave the tag out")
        )
    if len({descriptor.digest for descriptor in candidates}) == 1:
        return candidates[0], known[0] if known else None
    for name, descriptor in named:
        if name == "latest":
            return descriptor, name
    raise NotFoundError(
        f"{path} has {len(candidates)} images and none is tagged latest; name one of "
        f"{', '.join(known[:20]) or 'them: they have no tags'}"
    )


def _manifest(
    files: Files, descriptor: Descriptor, *, reference: str, architecture: str
) -> tuple[Descriptor, Manifest]:
    """Follow nested indexes down to the manifest for this platform."""
    for _ in range(_MAX_DEPTH):
        data = _blob(files, descriptor, what="manifest", reference=reference)
        if not documents.is_index(descriptor) and not _looks_like_index(data, descriptor):
            manifest = documents.decode(
                data, Manifest, what="manifest", reference=reference, digest=descriptor.digest
            )
            documents.check_manifest_type(manifest, reference=reference, digest=descriptor.digest)
            return descriptor, manifest
        index = documents.decode(data, Index, what="index", reference=reference, digest=descriptor.digest)
        descriptor = documents.choose_manifest(
            index, architecture=architecture, reference=reference, digest=descriptor.digest
        )
    raise ImageError(
        f"image {reference!r} nests more than {_MAX_DEPTH} indexes",
        reference=reference,
        digest=descriptor.digest,
    )


def _looks_like_index(data: bytes, descriptor: Descriptor) -> bool:
    """For a descriptor that does not say what it is of."""
    return not descriptor.media_type and b'"manifests"' in data


def _prepare(
    files: Files,
    digest: str,
    manifest: Manifest,
    directory: Path,
    report: Callable[[int, int], None],
    *,
    reference: str,
    architecture: str,
) -> Plan:
    data = _blob(files, manifest.config, what="configuration", reference=reference)
    document = documents.decode(
        data, ConfigDocument, what="configuration", reference=reference, digest=manifest.config.digest
    )
    documents.check_layers(manifest, document, architecture=architecture, reference=reference, digest=digest)
    # All sizes before the first copy: a layer cut short is told at once.
    for layer in manifest.layers:
        _check_size(files, layer, reference=reference)
    total_bytes = sum(layer.size for layer in manifest.layers)
    done_bytes = 0
    layers = []
    for layer, diff_id in zip(manifest.layers, document.rootfs.diff_ids, strict=True):
        provided = files.provide(
            _path(layer, reference=reference),
            directory,
            shifted(report, done_bytes, total_bytes),
        )
        if provided is None:
            raise _missing(layer, "layer", reference)
        done_bytes += provided.size_bytes
        layers.append(
            LayerFile(
                path=provided.path,
                media_type=layer.media_type,
                digest=layer.digest,
                diff_id=diff_id,
                size_bytes=provided.size_bytes,
            )
        )
    return Plan(
        digest=digest, config=document.image_config(), created=document.created or "", layers=tuple(layers)
    )


def _path(descriptor: Descriptor, *, reference: str) -> str:
    return f"blobs/sha256/{documents.digest_hex(descriptor.digest, reference=reference)}"


def _read(files: Files, name: str, *, reference: str) -> bytes:
    data = files.read(name, max_bytes=documents.MAX_DOCUMENT_BYTES)
    if data is None:
        raise ImageError(
            f"image {reference!r} has no file {name}: it is not an OCI layout", reference=reference
        )
    return data


def _blob(files: Files, descriptor: Descriptor, *, what: str, reference: str) -> bytes:
    """A small blob, its digest checked."""
    data = files.read(_path(descriptor, reference=reference), max_bytes=documents.MAX_DOCUMENT_BYTES)
    if data is None:
        raise _missing(descriptor, what, reference)
    actual = documents.digest_of(data)
    if actual != descriptor.digest:
        raise ImageError(
            f"{what} {descriptor.digest} of image {reference!r} is damaged: its digest is {actual}",
            reference=reference,
            digest=descriptor.digest,
        )
    return data


def _check_size(files: Files, layer: Descriptor, *, reference: str) -> None:
    size_bytes = files.size_bytes(_path(layer, reference=reference))
    if size_bytes is None:
        raise _missing(layer, "layer", reference)
    if size_bytes != layer.size and layer.size >= 0:
        raise ImageError(
            f"layer {layer.digest} of image {reference!r} has {size_bytes} bytes, {layer.size} are expected"
            + (": it is cut short" if size_bytes < layer.size else ""),
            reference=reference,
            digest=layer.digest,
        )


def _missing(descriptor: Descriptor, what: str, reference: str) -> ImageError:
    return ImageError(
        f"{what} {descriptor.digest} of image {reference!r} is missing",
        reference=reference,
        digest=descriptor.digest,
    )
