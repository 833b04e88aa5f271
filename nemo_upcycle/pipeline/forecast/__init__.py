"""What a run will do, shown before it is submitted: stages, memory, time, cost, disk, settings."""
