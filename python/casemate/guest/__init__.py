"""Guest assets: the kernel and the initrd that a sandbox boots from, found, made once, and kept in a cache."""

from __future__ import annotations

from casemate.guest.assets import GuestAssets, agent_path, resolve

__all__ = ["GuestAssets", "agent_path", "resolve"]
