"""What nobody needs any more, removed by age: images, and parts of downloads that nobody took up again."""

from __future__ import annotations

import time

import msgspec

from casemate.config.settings import Settings
from casemate.errors import InvalidConfigError, InvalidStateError, NotFoundError
from casemate.images.store import Store
from casemate.persist.recovery import list_names
from casemate.persist.store import is_owned, load_record

__all__ = ["DEFAULT_AGE_S", "CollectReport", "collect_garbage", "find_users"]

DEFAULT_AGE_S = 30 * 86400.0
# Between the look-up of an image and the record of the sandbox that uses it lie the fetch of a kernel and the boot.
_STARTING_S = 3600.0


class CollectReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection removed, or would.

    Args:
        removed: Names of the images, their digests where they had none or were damaged.
        freed_bytes: Size of their filesystems and of the parts.
        kept: How many images stay.
    """

    removed: tuple[str, ...]
    freed_bytes: int
    kept: int


def collect_garbage(
    settings: Settings, *, older_than_s: float = DEFAULT_AGE_S, dry_run: bool = False
) -> CollectReport:
    """Remove images that no start used for ``older_than_s`` seconds, and parts of downloads as old.

    An image that a sandbox on this host names stays, whether its owner lives or not; so does one used within the last
    hour: its sandbox may be about to start. Safe beside pulls, starts and other collections.

    Raises:
        InvalidConfigError: ``older_than_s`` is negative.
        InvalidStateError: A living sandbox can't be asked what it uses; nothing is removed.
        HostError: Something can't be removed.
    Blocks: for the removal.
    """
    if not older_than_s >= 0:
        raise InvalidConfigError(
            f"older_than_s is {older_than_s}, 0 or more seconds are expected", path="older_than_s"
        )
    store = Store(settings)
    now = time.time()
    # First the time, then the users: who starts in between is younger than the limit.
    used_before = now - max(older_than_s, _STARTING_S)
    users = find_users(settings)
    names = {image.digest: image.name for image in reversed(store.images())}
    removed: list[str] = []
    freed_bytes = kept = 0
    # Also those that are not whole, or of another version: they are no images to anybody else.
    for digest in store.digests():
        size_bytes = store.size_bytes(digest)
        old = digest not in users and 0 < store.used_at(digest) < used_before
        if old and (dry_run or store.collect(digest, used_before=used_before)):
            removed.append(names.get(digest) or digest)
            freed_bytes += size_bytes
        else:
            kept += 1
    parts_bytes = store.remove_parts(before=now - older_than_s, dry_run=dry_run)
    return CollectReport(removed=tuple(sorted(removed)), freed_bytes=freed_bytes + parts_bytes, kept=kept)


def find_users(settings: Settings) -> dict[str, tuple[str, ...]]:
    """The sandboxes of this host by the digest of the images they use. Blocks: for file reads.

    Raises:
        InvalidStateError: A living one has a state document that can't be read.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in list_names(settings):
        try:
            record = load_record(settings, name)
        except NotFoundError:
            # It has just been made, and its image was looked up within the hour.
            continue
        except InvalidConfigError as error:
            if not is_owned(settings, name):
                continue
            raise InvalidStateError(
                f"sandbox {name} is alive and what it uses can't be read: {error}",
                state="unreadable",
                wanted="readable",
                sandbox_id=name,
            ) from error
        for container in record.containers:
            found[container.image_digest] = (*found.get(container.image_digest, ()), name)
    return found
