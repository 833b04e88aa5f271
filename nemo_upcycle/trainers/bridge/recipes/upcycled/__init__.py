"""Upcycled models, a family in Bridge's sense."""
