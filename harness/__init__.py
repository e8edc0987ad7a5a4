"""The engine of tailrace: it knows experiments, schedules, servers and records, and no framework by name."""

__version__ = "0.1.0"
