"""What a cluster does to a run: the faults of `benchmarks.chaos`."""
