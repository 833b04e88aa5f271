"""Tests for Megatron-Bridge with transformers 5, in `make test-in ENV=bridge` and `make test-in ENV=bridge-next`."""
