"""Hugging Face folders of upcycled models: from a dense folder, or from a checkpoint."""
