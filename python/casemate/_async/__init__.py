"""Everything that waits. This is the source of both faces: ``_sync`` is made from it."""
