"""The chain of stages in Megatron-Bridge: its trainings, its command, and the chains of recipes."""
