"""The chain as a NeMo-Run experiment: import -> upcycle -> pretrain -> dense_ct -> export -> evaluate -> report."""
