"""Images: from registries, OCI layouts and archives, unpacked once into a read-only filesystem by digest.

Names are resolved on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from casemate.images.collection import CollectReport, collect_garbage
    from casemate.images.process import DEFAULT_PATH, ProcessPlan, compose_process
    from casemate.images.reference import Reference, parse_reference
    from casemate.images.resolution import PullPolicy, list_images, pull, remove, resolve
    from casemate.images.types import Filesystem, Image, ImageConfig, Phase, Progress, ReportProgress
    from casemate.images.user import ResolvedUser, resolve_user

_HOMES = {
    "CollectReport": "collection",
    "DEFAULT_PATH": "process",
    "Filesystem": "types",
    "Image": "types",
    "ImageConfig": "types",
    "Phase": "types",
    "ProcessPlan": "process",
    "Progress": "types",
    "PullPolicy": "resolution",
    "Reference": "reference",
    "ReportProgress": "types",
    "ResolvedUser": "user",
    "collect_garbage": "collection",
    "compose_process": "process",
    "list_images": "resolution",
    "parse_reference": "reference",
    "pull": "resolution",
    "remove": "resolution",
    "resolve": "resolution",
    "resolve_user": "user",
}

__all__ = [
    "DEFAULT_PATH",
    "CollectReport",
    "Filesystem",
    "Image",
    "ImageConfig",
    "Phase",
    "ProcessPlan",
    "Progress",
    "PullPolicy",
    "Reference",
    "ReportProgress",
    "ResolvedUser",
    "collect_garbage",
    "compose_process",
    "list_images",
    "parse_reference",
    "pull",
    "remove",
    "resolve",
    "resolve_user",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
