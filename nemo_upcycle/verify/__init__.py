"""Compare a dense model with the MoE model that was made from it."""
