# Made by scripts/unasync.py from python/casemate/_async/__init__.py; do not edit.
"""Everything that waits. This is the source of both faces: ``_sync`` is made from it."""
