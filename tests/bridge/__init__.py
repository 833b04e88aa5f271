"""Tests in the environment of `make test-in ENV=bridge`: Megatron-Bridge, Megatron-Core 0.19, transformers 5."""
