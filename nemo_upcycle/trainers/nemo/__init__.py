"""Training in NeMo: the recipes, and the strategy and callbacks that an upcycled model needs in addition."""
