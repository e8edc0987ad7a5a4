"""What can go wrong on purpose: a module for each kind of fault."""
