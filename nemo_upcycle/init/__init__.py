"""Pure tensor functions that make a layer's experts and router from the dense feed-forward network."""

from nemo_upcycle.init import methods, routers  # noqa: F401 - they hand their names to the spec
