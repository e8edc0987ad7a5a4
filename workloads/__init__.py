"""The models that are served, one folder each."""
