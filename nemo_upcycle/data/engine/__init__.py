"""The engine of the data stage: it turns texts into clean, tokenised shards, in the data environment (`make venv`)."""
