"""Tests of `nemo-upcycle start`: from a model and texts to a recipe and a blend."""
