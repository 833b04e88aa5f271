"""The commands of NeMo's recipes."""
