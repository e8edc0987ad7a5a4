"""A server without a framework, whose behaviour is a script: how the harness tests itself."""
