"""The kernel's own events turned into faults and address-space changes of the mount's users.

The path: ``session`` (tracefs instances) -> ``ring`` (binary sub-buffers to rows of integers) ->
``grammar`` with ``processes``, ``syscalls`` and ``vmas`` (rows to the records of ``events``) ->
``observer`` (the facade the daemon holds). Nothing here knows what xipfs charges for a fault.
"""
