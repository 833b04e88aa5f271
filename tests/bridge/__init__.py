"""Tests in the environments of `make test-in`, `ENV=bridge` and `ENV=bridge-next`: Megatron-Bridge, transformers 5."""
