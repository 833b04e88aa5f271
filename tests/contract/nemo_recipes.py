"""Factories of NeMo's side, as a user's own may be: `tests.bridge.recipes` has Bridge's of these names."""

# No postponed annotations: NeMo-Run reads those of factories.

import nemo_run as run

from nemo_upcycle.trainers.nemo.recipes import load_recipe
from tests.contract.trainers import training_text


def moe() -> run.Partial:
    """An upcycled model on two ranks."""
    return load_recipe(training_text(ranks=2))


def dense_ct() -> run.Partial:
    """Its dense baseline."""
    return load_recipe(training_text(kind="dense_ct", ranks=2))
