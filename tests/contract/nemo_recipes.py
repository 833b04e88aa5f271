"""NeMo factories as a user might write them; `tests.bridge.recipes` has Bridge recipes with the same names."""

# No postponed annotations, because NeMo-Run reads the annotations of factories.

import nemo_run as run

from nemo_upcycle.trainers.nemo.recipes import load_recipe
from tests.contract.trainers import training_text


def moe() -> run.Partial:
    """Return an upcycled model on two ranks."""
    return load_recipe(training_text(ranks=2))


def dense_ct() -> run.Partial:
    """Return the dense baseline of `moe`."""
    return load_recipe(training_text(kind="dense_ct", ranks=2))
