"""Transformer Engine's FP8 arithmetic on a CPU: what a recipe's `fp8` and `fp8_recipe` do to Megatron's layers."""
