"""Find and fetch checkpoints, and read them by slice, never whole."""
