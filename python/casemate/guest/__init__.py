"""Guest assets: the kernel and the initrd that a sandbox boots from, found, made once, and kept in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casemate.guest.assets import GuestAssets, agent_path, resolve

__all__ = ["GuestAssets", "agent_path", "resolve"]


def __getattr__(name: str) -> Any:
    # The kernel parameters are wanted by every program, the rest only once something is to be booted.
    if name in __all__:
        from casemate.guest import assets

        return getattr(assets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
