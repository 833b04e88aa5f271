"""The chain, a NeMo-Run experiment: import, data, upcycle, pretrain, dense_ct, export, evaluate, report."""
