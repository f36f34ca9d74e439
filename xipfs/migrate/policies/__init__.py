"""Policies: each looks at what was charged and returns a plan; none can touch the filesystem."""
