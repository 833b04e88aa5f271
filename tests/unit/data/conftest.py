"""The small model, and wheels that pip really downloads, of the demo's tests."""

from tests.unit.demo.conftest import tiny_dense, tiny_gguf, wheel_house


__all__ = ["tiny_dense", "tiny_gguf", "wheel_house"]
