"""The adapter of KServe's Python model server."""
