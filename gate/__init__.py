"""The gate: whether a candidate is worse than a baseline, as an exit code, with saved baselines and the trials that it takes."""
