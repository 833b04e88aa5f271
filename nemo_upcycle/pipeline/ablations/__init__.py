"""Ablations: arms times seeds from one parent on one blend, with a table that tells differences from noise."""
