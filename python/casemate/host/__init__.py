"""What this host offers, found out by asking it: each answer is a :class:`~casemate.host.finding.Finding` with its reason and its cure.

Nothing here loads a module, makes a device or changes a setting.
"""
