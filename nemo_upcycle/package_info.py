"""Version of the package. No other file states the version."""

__version__ = "0.3.0"
