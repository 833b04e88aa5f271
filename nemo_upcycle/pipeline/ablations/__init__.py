"""Ablations: train every arm with every seed on one blend, and show in a table which differences exceed the noise."""
