"""The FUSE layer: translate a request, call the filesystem, translate the answer back."""
