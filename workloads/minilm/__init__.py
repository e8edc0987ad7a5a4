"""A sentence embedder with real weights as a workload."""
