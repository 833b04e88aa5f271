"""Conversations, packed into sequences for fine-tuning, with the loss on the answers only."""
