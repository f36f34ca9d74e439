"""The crash explorer: workloads, the states that a power cut leaves, and their judgement."""
