"""The forecast of a run, shown before it is submitted: stages, memory, time, cost, disk, settings."""
