"""Sandboxes on disk: one directory a sandbox, one versioned document in it."""
