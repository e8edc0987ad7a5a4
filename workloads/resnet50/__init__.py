"""An image classifier with seeded weights as a workload."""
