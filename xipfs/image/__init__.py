"""The image format: superblock, journal, allocator, inodes, mkfs."""
