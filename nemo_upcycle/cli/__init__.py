"""The commands of `nemo-upcycle`, one module per command."""
