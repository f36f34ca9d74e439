"""The filesystem: names, bytes and placement, without FUSE types and without await."""
