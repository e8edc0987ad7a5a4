"""What authors of adapters and workloads read: the interfaces that they implement, and what helps with it."""
