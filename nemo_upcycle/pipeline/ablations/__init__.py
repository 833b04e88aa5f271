"""Ablations: train arms times seeds from one parent on one blend, and tell differences from noise in a table."""
