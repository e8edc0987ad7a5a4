"""What a trial has beside its server and its load, a module each: context managers that :mod:`tailrace.harness.run.trial` enters
in the order written there. What one needs and gives is in its signature."""
