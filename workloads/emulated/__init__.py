"""The emulated accelerator as a workload."""
