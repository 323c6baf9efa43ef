"""The keeper: a native process that holds a detached sandbox, seen from the processes that use it.

Nothing here decides; it starts the keeper, asks it, and reads what it leaves. The program is the crate ``casemate-shim``.
"""
