"""The Ray Serve adapter."""
