"""Load generation: its own process, hosted by Locust, one dispatcher per worker."""
