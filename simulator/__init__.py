"""A discrete-event model of a serving system: what it would do under a trace, in milliseconds instead of minutes."""
