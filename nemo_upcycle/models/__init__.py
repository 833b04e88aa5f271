"""What a model is: its architecture, the mapping of its tensors, how they are sharded, its configurations."""

from nemo_upcycle.models import families  # noqa: F401 - they hand themselves to the architecture
