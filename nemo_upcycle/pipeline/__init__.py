"""The stages of the chain: import, data, upcycle, pretrain, dense_ct, export, evaluate, report."""
