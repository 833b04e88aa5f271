"""From a model and texts to files."""
