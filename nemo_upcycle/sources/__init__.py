"""Checkpoints read by slice, never whole."""

from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.resolve import open_dense


__all__ = ["DenseSource", "open_dense"]
