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
from megatron.bridge.models.gpt_provider import GPTModelProvider
from transformers import AutoConfig, Qwen2Config

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.families.base import MoeFamily
from nemo_upcycle.models.wrapper import WRAPPERS
from nemo_upcycle.trainers.bridge.bridged import bridged_provider


class MiMoConfig(Qwen2Config):  # type: ignore[misc]
    """Of a class whose code is in its own repository: Qwen2's, with layers that predict further tokens."""

    model_type = "mimo"


AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
SPEC = UpcycleSpec(num_experts=8, top_k=2)
_OWN_CODE = "its configuration is code in its own repository"
#: Class -> its configuration, where that is known without that code.
_LIKE = {"MiMoForCausalLM": MiMoConfig}
#: Classes of Bridge's that are no models of text, nor of text and something else.
_OTHERS = {"NemotronLabsDiffusionModel": "a diffusion model"}
#: Classes that tests/bridge/test_bridged.py fills; and those that show when they are built that they stay dense.
_FILLED = ("Nemotron", "Gemma", "MiMo", "Llama", "Qwen2Audio", "Qwen2_5_VL", "Mistral3")
_OTHERS |= dict.fromkeys(
    ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"), "its layers ignore num_moe_experts, once they are built"
)


def main() -> None:
    """Print the table, and how many rows are what."""
    logging.disable(logging.WARNING)
    rows = {name: state_of(name) for name in sorted(map(str, AutoBridge.list_supported_models()))}
    print("| class | by a family of this package | through Bridge's mapping |\n|---|---|---|")
    for name, (by_family, through_bridge) in rows.items():
        print(f"| `{name}` | {by_family} | {through_bridge} |")
    kinds = ("a family" if own else "Bridge" if theirs == "yes" else "neither" for own, theirs in rows.values())
    counts = Counter(kinds)
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
        by_family = (family.no_parent_because and f"no: {family.no_parent_because}") or "yes: it gets more experts"
    return by_family, _through_bridge(name)


def _through_bridge(name: str) -> str:
    if name in _OTHERS:
        return f"no: {_OTHERS[name]}"
    config_class: Any = _LIKE.get(name) or getattr(getattr(transformers, name, None), "config_class", None)
    if config_class is None:
        return f"no: {because}" if (because := _not_from_outside(name)) else f"not tried: {_OWN_CODE}"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = config_class()
        config.architectures = [name]
        config.save_pretrained(folder)
        try:
            bridged_provider(Path(folder), SPEC)
        except UpcycleError as error:
            return f"no: {str(error.got).removeprefix(f'{name}, ')}"
    return "yes" if name.partition("For")[0] in _FILLED else "its provider gets experts; no such parent was filled"


def _not_from_outside(name: str) -> str:
    """Return why a class gets no experts, as far as Bridge says so without its configuration."""
    bridge = get_model_bridge(name)
    if bridge.PROVIDER_CLASS and not issubclass(bridge.PROVIDER_CLASS, GPTModelProvider):
        return f"by Bridge's {bridge.PROVIDER_CLASS.__name__}"
    with contextlib.suppress(Exception):  # some ask the configuration
        if any(".experts." in mapping.megatron_param for mapping in bridge.mapping_registry().get_all_mappings()):
            return "with experts"
    return "with experts" if "moe" in name.lower() else ""


if __name__ == "__main__":
    main()
