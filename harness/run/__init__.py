"""Running: trials from deploy to stop, their faults and collectors, cold starts, the ruler."""
