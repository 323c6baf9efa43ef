"""``casemate rmi``: ``casemate images rm`` under the name that people try first."""

from __future__ import annotations

from casemate.cli.images import add_remove_arguments, remove

__all__ = ["add_arguments", "run"]

add_arguments = add_remove_arguments
run = remove
