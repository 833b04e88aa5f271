"""Conversations -> packed sequences for fine-tuning, with a loss on the answers alone."""
