"""Documents of OCI images and of ``docker save``: forms, bounds, media types. No I/O."""

from __future__ import annotations

import hashlib
import re
from typing import TypeVar

import msgspec

from casemate.errors import ImageError
from casemate.images.types import ImageConfig

__all__ = [
    "INDEX_MEDIA_TYPES",
    "MANIFEST_MEDIA_TYPES",
    "MAX_DOCUMENT_BYTES",
    "ConfigDocument",
    "Descriptor",
    "DockerArchiveItem",
    "Index",
    "LayoutMarker",
    "Manifest",
    "canonical_digest",
    "check_layers",
    "check_manifest_type",
    "choose_descriptors",
    "choose_manifest",
    "decode",
    "digest_hex",
    "digest_of",
    "is_index",
    "platforms_of",
]

MAX_DOCUMENT_BYTES = 8 << 20
_MAX_MANIFESTS = 10_000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_T = TypeVar("_T")

INDEX_MEDIA_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_MEDIA_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
LAYER_MEDIA_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
REFERENCE_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"


class Platform(msgspec.Struct, frozen=True):
    """Platform of a manifest in an index."""

    architecture: str = ""
    os: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A blob by digest."""

    digest: str
    size: int = -1
    media_type: str = ""
    annotations: dict[str, str] | None = None
    platform: Platform | None = None


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """``index.json`` or a nested index."""

    manifests: tuple[Descriptor, ...] = ()
    media_type: str = ""


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest, OCI or Docker schema 2."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = ""


class LayoutMarker(msgspec.Struct, frozen=True, rename="camel"):
    """``oci-layout``."""

    image_layout_version: str


class DockerArchiveItem(msgspec.Struct, frozen=True, rename="pascal"):
    """One image in ``manifest.json`` of ``docker save``."""

    config: str
    layers: tuple[str, ...]
    repo_tags: tuple[str, ...] | None = None


class _ProcessConfig(msgspec.Struct, frozen=True, rename="pascal"):
    user: str | None = None
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | str | None = None
    cmd: tuple[str, ...] | str | None = None
    working_dir: str | None = None
    volumes: dict[str, object] | None = None
    exposed_ports: dict[str, object] | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class ConfigDocument(msgspec.Struct, frozen=True):
    """An image's configuration blob."""

    rootfs: _RootFs
    architecture: str = ""
    os: str = ""
    created: str | None = None
    config: _ProcessConfig | None = None

    def image_config(self) -> ImageConfig:
        """The part about the process, in our form. Does not block."""
        given = self.config or _ProcessConfig()
        return ImageConfig(
            entrypoint=_words(given.entrypoint),
            command=_words(given.cmd),
            env=given.env or (),
            working_dir=given.working_dir or "",
            user=given.user or "",
            volumes=tuple(sorted(given.volumes or ())),
            exposed_ports=tuple(sorted(given.exposed_ports or ())),
            stop_signal=given.stop_signal or "",
            labels=given.labels or {},
        )


def _words(given: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


def decode(data: bytes, form: type[_T], *, what: str, reference: str, digest: str = "") -> _T:
    """Decode ``data``, checked. Does not block.

    Raises:
        ImageError: It is not such a document.
    """
    try:
        return msgspec.json.decode(data, type=form)
    # Bytes that are not UTF-8 and nesting beyond the stack have errors of their own.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ImageError(
            f"{what} of image {reference!r} can't be read: {exc}", reference=reference, digest=digest
        ) from exc


def digest_of(data: bytes) -> str:
    """``sha256:…`` of ``data``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_hex(digest: str, *, reference: str) -> str:
    """The 64 hexadecimal digits of a digest: safe as a file name. Does not block.

    Raises:
        ImageError: Not a sha256 digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise ImageError(
            f"image {reference!r} has the digest {digest!r}; sha256: and 64 lower-case hexadecimal digits are expected",
            reference=reference,
            digest=digest,
        )
    return digest.removeprefix("sha256:")


def canonical_digest(config_digest: str, diff_ids: tuple[str, ...]) -> str:
    """Digest for an image without a manifest of its own: of configuration and layers in order. Does not block."""
    return digest_of(msgspec.json.encode({"config": config_digest, "layers": diff_ids}))


def is_index(descriptor: Descriptor) -> bool:
    """Whether the descriptor is of an index."""
    return descriptor.media_type in INDEX_MEDIA_TYPES


def names_of(descriptor: Descriptor) -> tuple[str, ...]:
    """The names an index gives to a descriptor, none to two."""
    annotations = descriptor.annotations or {}
    return tuple(annotations[key] for key in (REFERENCE_NAME, FULL_NAME) if annotations.get(key))


def choose_descriptors(index: Index, *, architecture: str) -> tuple[Descriptor, ...]:
    """Those of an index that can be an image for linux on ``architecture``. Does not block."""
    chosen = []
    for descriptor in index.manifests:
        platform = descriptor.platform
        # Docker puts attestations beside the image, under the platform unknown/unknown.
        fits = platform is None or (
            platform.os in ("", "linux") and platform.architecture in ("", architecture)
        )
        if fits and (is_index(descriptor) or descriptor.media_type in (*MANIFEST_MEDIA_TYPES, "")):
            chosen.append(descriptor)
    return tuple(chosen)


def choose_manifest(index: Index, *, architecture: str, reference: str, digest: str) -> Descriptor:
    """The manifest, or index, for linux on ``architecture``; one that names its platform before one that does not. Does not block.

    Raises:
        ImageError: There is none.
    """
    chosen = choose_descriptors(index, architecture=architecture)
    if not chosen or len(index.manifests) > _MAX_MANIFESTS:
        raise ImageError(
            f"image {reference!r} has nothing for linux/{architecture}: its index lists {platforms_of(index)}",
            reference=reference,
            digest=digest,
        )
    return next((one for one in chosen if one.platform is not None and one.platform.os), chosen[0])


def platforms_of(index: Index) -> str:
    """The platforms of an index, for the text of an error."""
    found = (entry.platform for entry in index.manifests[:20] if entry.platform is not None)
    return ", ".join(f"{platform.os}/{platform.architecture}" for platform in found) or "no image"


def check_manifest_type(manifest: Manifest, *, reference: str, digest: str) -> None:
    """Check that a manifest is that of an image. Does not block. Raises: ImageError."""
    if manifest.media_type and manifest.media_type not in MANIFEST_MEDIA_TYPES:
        raise ImageError(
            f"image {reference!r} has a manifest of media type {manifest.media_type!r}, which is not an image",
            reference=reference,
            digest=digest,
        )


def check_layers(
    manifest: Manifest, document: ConfigDocument, *, architecture: str, reference: str, digest: str
) -> None:
    """Check what the manifest and the configuration say of layers and platform. Does not block.

    Raises:
        ImageError: A layer of a form that can't be unpacked, a count that does not fit, another platform.
    """
    for layer in manifest.layers:
        digest_hex(layer.digest, reference=reference)
        if layer.media_type not in LAYER_MEDIA_TYPES:
            foreign = "foreign" in layer.media_type or "nondistributable" in layer.media_type
            raise ImageError(
                f"layer {layer.digest} of image {reference!r} is "
                + (
                    f"a foreign layer ({layer.media_type})"
                    if foreign
                    else f"of media type {layer.media_type!r}"
                )
                + "; a tar layer (plain, gzip or zstd) is expected",
                reference=reference,
                digest=layer.digest,
            )
    check_configuration(
        document, len(manifest.layers), architecture=architecture, reference=reference, digest=digest
    )


def check_configuration(
    document: ConfigDocument, layers: int, *, architecture: str, reference: str, digest: str
) -> None:
    """Check that the configuration is for our platform and names ``layers`` layers. Does not block.

    Raises:
        ImageError: It does not.
    """
    if document.os not in ("", "linux") or document.architecture not in ("", architecture):
        raise ImageError(
            f"image {reference!r} is for {document.os}/{document.architecture}, linux/{architecture} is expected",
            reference=reference,
            digest=digest,
        )
    if len(document.rootfs.diff_ids) != layers:
        raise ImageError(
            f"image {reference!r} has {layers} layers, its configuration names {len(document.rootfs.diff_ids)}",
            reference=reference,
            digest=digest,
        )
    for diff_id in document.rootfs.diff_ids:
        digest_hex(diff_id, reference=reference)
