"""From a model and texts to a recipe and a blend: what `nemo-upcycle start` finds, chooses and writes."""
