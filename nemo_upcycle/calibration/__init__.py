"""Run a dense model layer by layer over prompts, of which routers are made."""
