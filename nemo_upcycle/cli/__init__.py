"""The tools behind `nemo-upcycle`, one module a command."""
