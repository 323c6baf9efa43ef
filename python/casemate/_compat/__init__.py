"""What differs between the two faces: ``aio`` waits on an event loop, ``blocking`` waits in the calling thread.

Both modules have the same names with the same meaning. ``_async`` imports ``aio``; the script that makes ``_sync`` from
it puts ``blocking`` in its place. Deadlines are points of ``time.monotonic()``; None means no deadline.
"""
