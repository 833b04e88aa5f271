"""Run a dense model over a sample of text, layer by layer, and keep what routers from data and splits are made of."""
