"""The engine of the data stage: text to clean, tokenised shards. Runs in the data environment (`make venv`)."""
