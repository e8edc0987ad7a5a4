"""What is to be measured: the experiment as a user writes it, its cells, trials, schedules and faults, as pure data."""
