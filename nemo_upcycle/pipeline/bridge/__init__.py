"""The chain of stages in Megatron-Bridge: its trainings, its command, the recipes' own chains."""
