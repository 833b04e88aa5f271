"""Tests for the environments `ENV=bridge` and `ENV=bridge-next` of `make test-in`: Megatron-Bridge, transformers 5."""
