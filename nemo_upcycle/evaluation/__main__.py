"""lm-eval's own command, plus this package's model: `python -m nemo_upcycle.evaluation run --model nemo_upcycle`.

lm-eval releases after 0.4.13 find the model by themselves (entry point `lm_eval.models`).
"""

from __future__ import annotations

import sys

import lm_eval.models  # noqa: F401 - its own models: it imports them by itself only while none is known
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from nemo_upcycle.errors import CheckoutError
from nemo_upcycle.utils.checkout import require_one_checkout


NAME = "nemo_upcycle"

if __name__ == "__main__":
    try:
        require_one_checkout()
    except CheckoutError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(error.exit_status) from None
    if NAME not in model_registry:
        model_registry.register(NAME, target="nemo_upcycle.evaluation.megatron.lm:MegatronLM")
    cli_evaluate()
