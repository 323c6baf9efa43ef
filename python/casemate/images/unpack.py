"""From a found image to a stored one: layers onto a tree, the tree into a filesystem."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from casemate._core import read_tree_file, unpack_layer
from casemate.config.settings import Settings
from casemate.errors import ImageError, UnsupportedError
from casemate.images.disk import typed_errors
from casemate.images.rootfs import choose_filesystem, make_filesystem
from casemate.images.source import Candidate, Plan, shifted
from casemate.images.store import ImageRecord, Store
from casemate.images.types import Phase, Progress, ReportProgress
from casemate.observe import failpoints

__all__ = ["store_image"]

_MAX_ACCOUNTS_BYTES = 1 << 20
_PACK_TIMEOUT_S = 900.0


def store_image(
    store: Store, candidate: Candidate, *, reference: str, settings: Settings, progress: ReportProgress | None
) -> ImageRecord:
    """Unpack ``candidate`` into the store, or return what another process put there meanwhile.

    Raises:
        ImageError: A layer is damaged, not what its digest says, or not of a form that can be unpacked.
        UnsupportedError: Not root, or no program to make a filesystem.
        HostError, ResourceExhaustedError: The host can't hold it.
    Blocks: about 2 s for a layer of 200 MB, plus the wait for another process.
    """
    if os.geteuid() != 0:
        raise UnsupportedError(
            f"image {reference!r} is not unpacked yet and unpacking needs root (owners, device nodes); run this once as root",
            capability="root",
        )
    fstype, program = choose_filesystem()

    def report(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        if progress is not None:
            progress(Progress(phase=phase, done_bytes=done_bytes, total_bytes=total_bytes))

    def fill(work: Path) -> ImageRecord:
        blobs, tree = work / "blobs", work / "tree"
        with typed_errors(work):
            blobs.mkdir()
            tree.mkdir(mode=0o755)
            # For an image that says nothing of its root directory.
            os.chmod(tree, 0o755)
            os.utime(tree, (0, 0))
        plan = candidate.prepare(blobs, partial(report, candidate.phase))
        tree_bytes = _unpack(plan, tree, reference, settings.max_image_bytes, report)
        passwd, group = (_account_text(tree, name, reference) for name in ("etc/passwd", "etc/group"))
        report("pack", 0, tree_bytes)
        failpoints.hit("image.pack")
        size_bytes = make_filesystem(
            fstype,
            program,
            tree,
            work / "image" / f"rootfs.{fstype}",
            digest=plan.digest,
            timeout_s=_PACK_TIMEOUT_S * settings.timeout_factor,
        )
        report("pack", tree_bytes, tree_bytes)
        return ImageRecord(
            digest=plan.digest,
            config=plan.config,
            fstype=fstype,
            size_bytes=size_bytes,
            layers=tuple(layer.diff_id for layer in plan.layers),
            created=plan.created,
            passwd=passwd,
            group=group,
        )

    return store.make(candidate.digest, fill, waiting=lambda: report("wait", 0, 0))


def _unpack(
    plan: Plan,
    tree: Path,
    reference: str,
    max_bytes: int,
    report: Callable[[Phase, int, int], None],
) -> int:
    total_bytes = sum(layer.size_bytes for layer in plan.layers)
    done_bytes = unpacked_bytes = 0
    for layer in plan.layers:
        failpoints.hit("image.unpack")
        try:
            unpacked_bytes += unpack_layer(
                layer.path,
                tree,
                media_type=layer.media_type,
                digest=layer.digest,
                diff_id=layer.diff_id,
                max_bytes=max_bytes - unpacked_bytes,
                progress=shifted(partial(report, "unpack"), done_bytes, total_bytes),
            )
        except ImageError as exc:
            exc.reference = reference
            exc.add_note(f"while unpacking image {reference!r}")
            raise
        done_bytes += layer.size_bytes
    return unpacked_bytes


def _account_text(tree: Path, name: str, reference: str) -> str:
    try:
        content = read_tree_file(tree, name, max_bytes=_MAX_ACCOUNTS_BYTES)
    except ImageError as exc:
        exc.reference = reference
        exc.add_note(f"while reading /{name} of image {reference!r}")
        raise
    return "" if content is None else content.decode(errors="replace")
