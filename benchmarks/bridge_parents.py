"""Which of the classes that Megatron-Bridge registers become models with experts here, and why others do not.

python -m benchmarks.bridge_parents

Prints a table. Each class is tried by the default configuration of its class in transformers, without weights: Bridge
makes its provider, and that gets experts. Where transformers does not have the class, for its code lies in its own
repository, what Bridge maps tells whether it has experts.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.model_bridge import get_model_bridge

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.families.base import MoeFamily
from nemo_upcycle.models.wrapper import WRAPPERS
from nemo_upcycle.trainers.bridge.bridged import bridged_provider


SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: Classes of Bridge's that are no models of text, nor of text and something else.
_OTHERS = {"NemotronLabsDiffusionModel": "a diffusion model"}


def main() -> None:
    """Print the table, and how many rows are what."""
    logging.disable(logging.WARNING)
    rows = {name: state_of(name) for name in sorted(map(str, AutoBridge.list_supported_models()))}
    print("| class | by a family of this package | through Bridge's mapping |\n|---|---|---|")
    for name, (by_family, through_bridge) in rows.items():
        print(f"| `{name}` | {by_family} | {through_bridge} |")
    counts = Counter(
        "a family" if own else "Bridge" if theirs == "yes" else "neither" for own, theirs in rows.values()
    )
    print(f"\n{len(rows)} classes: " + ", ".join(f"{count} by {kind}" for kind, count in counts.most_common()))


def state_of(name: str) -> tuple[str, str]:
    """Say what fills models of a class: a family, what Bridge knows, or neither, with the reason.

    Args:
        name: the class.
    """
    family = find_family(name)
    wrapper = next((one for one in WRAPPERS if one.hf_class == name), None)
    by_family = "yes" if family else "its text model" if wrapper else ""
    if isinstance(family, MoeFamily):
        by_family = (family.no_parent_because and f"no: {family.no_parent_because}") or "yes: more experts"
    return by_family, _through_bridge(name)


def _through_bridge(name: str) -> str:
    if name in _OTHERS:
        return f"no: {_OTHERS[name]}"
    model_class: Any = getattr(transformers, name, None)
    if model_class is None:
        with contextlib.suppress(Exception):  # what a configuration decides
            mappings = get_model_bridge(name).mapping_registry().get_all_mappings()
            if any(".experts." in mapping.megatron_param for mapping in mappings):
                return "no: it has experts"
        return "not tried: its configuration is code in its own repository"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = model_class.config_class()
        config.architectures = [name]
        config.save_pretrained(folder)
        try:
            bridged_provider(Path(folder), SPEC)
        except UpcycleError as error:
            return f"no: {str(error.got).removeprefix(f'{name}, ')}"
    return "yes"


if __name__ == "__main__":
    main()
