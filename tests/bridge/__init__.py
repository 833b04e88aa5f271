"""Tests in the environment of `make bridge-env`: Megatron-Bridge, Megatron-Core 0.19, transformers 5."""
