"""Traffic: generators, importers, and the arithmetic of traces."""
