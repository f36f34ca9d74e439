"""Moving pages between XIP and pagecache: the engine that does it, the policies that ask for it."""
