"""Description of a model: its architecture, tensor mapping, sharding and configuration."""

from nemo_upcycle.models import families  # noqa: F401 - they hand themselves to the architecture
