"""Many models in one memory: who stays in it, and what servers load in place of a model. Standard library alone."""
