"""Built-in experiments: YAML files to run by name, and to copy."""
