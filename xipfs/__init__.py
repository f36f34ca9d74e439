"""xipfs: VM_MIXEDMAP made visible.

A FUSE filesystem over a simulated NVRAM region in which each page of each file is either XIP
(no struct page, never counted) or pagecache (a struct page, counted), and a userspace model of
the kernel's mm that charges every real mmap fault the way the 2008 patch would have.
"""

__version__ = "0.1.0"
