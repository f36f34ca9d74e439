"""Random programs whose page tables are compared with the kernel's: tools/verify and its tests."""
