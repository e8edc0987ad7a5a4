"""Servers: who owns their processes, what they run in, and how several become one endpoint."""
