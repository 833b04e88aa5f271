"""What a model is: its architecture, the mapping of its tensors, how they are sharded, its configurations."""
