"""What the benchmarks share: processes and mounts that end, rounds, statistics, tables."""
