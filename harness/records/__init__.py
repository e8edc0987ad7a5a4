"""What was measured: the schema of a run, its typed records, and the folder that they lie in."""
