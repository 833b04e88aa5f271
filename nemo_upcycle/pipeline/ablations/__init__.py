"""Ablations: arms times seeds from one parent on one blend, with a table that says what is a difference."""
