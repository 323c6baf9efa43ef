"""QEMU without waiting: the plan of a VM, its command line, the QMP protocol, and what an exit means."""
