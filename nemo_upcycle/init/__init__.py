"""Pure tensor functions that make a layer's experts and router from the dense feed-forward network."""
