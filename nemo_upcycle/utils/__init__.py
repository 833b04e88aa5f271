"""Files, streams and progress."""
