"""Search: which settings of a framework serve a trace best within an objective, on real servers or in the simulator."""
