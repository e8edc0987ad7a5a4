"""The harness: it knows experiments, schedules, servers and records, and no framework by name."""
