"""The frameworks that race, one folder each."""
