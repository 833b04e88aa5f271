"""Training in NeMo: recipes, and what a training of an upcycled model adds to NeMo's own."""
