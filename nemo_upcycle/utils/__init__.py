"""Files, streams, configurations and progress."""
