"""Evaluate a Megatron model as it is trained: a checkpoint under any layout, or the live model of a training job."""
