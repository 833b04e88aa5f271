"""The CPU backend: what lets stock NeMo and Megatron run without CUDA."""
