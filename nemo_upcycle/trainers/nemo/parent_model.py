"""NeMo's model of a parent of any size: the configuration class of the parent's family with the parent's settings.

If NeMo has no configuration for a family, its configuration of Llama (dense) or Mixtral (with experts) is used, with
layers of this package.
"""

# Do not postpone annotations here, and use Optional: NeMo-Run needs annotations to parse settings of the model.

from typing import Any

import nemo_run as run
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.collections.llm.gpt.model.gemma import GemmaConfig, GemmaModel
from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig, LlamaModel
from nemo.collections.llm.gpt.model.mistral import MistralConfig7B, MistralModel
from nemo.collections.llm.gpt.model.mixtral import MixtralConfig, MixtralModel
from nemo.collections.llm.gpt.model.phi3mini import Phi3Config, Phi3Model
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Config, Qwen2Model
from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config, Qwen3Model, Qwen3MoEConfig

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.activation import activation_function, activation_of
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import window_fields
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.models.rotary import LONGROPE, nemo_scaling
from nemo_upcycle.online.decoder_layers import decoder_layers, layers_of
from nemo_upcycle.planning.hardware import known_parent
from nemo_upcycle.sources.fetch import tokenizer_folder
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.nemo.olmo2 import Olmo2Config, Olmo2Model
from nemo_upcycle.trainers.nemo.phi3mini import LongRopePhi3Config


#: Configuration and model, by a family's `nemo_module` and whether it has experts. `_FURTHER` has other families.
_CLASSES: dict[tuple[str, bool], tuple[type, type]] = {
    ("llama", False): (LlamaConfig, LlamaModel),
    ("mistral", False): (MistralConfig7B, MistralModel),
    ("qwen2", False): (Qwen2Config, Qwen2Model),
    ("qwen3", False): (Qwen3Config, Qwen3Model),
    ("qwen3", True): (Qwen3MoEConfig, Qwen3Model),
    ("gemma", False): (GemmaConfig, GemmaModel),
    ("olmo2", False): (Olmo2Config, Olmo2Model),
    ("phi3mini", False): (Phi3Config, Phi3Model),
    ("mixtral", True): (MixtralConfig, MixtralModel),
}
#: Configuration and model for families that NeMo has no class for, by whether there are experts.
_FURTHER = {False: (LlamaConfig, LlamaModel), True: (MixtralConfig, MixtralModel)}
#: Configurations that scale rotary frequencies, by the unscaled configuration and the kind of scaling.
_SCALED = {(LlamaConfig, "llama3"): Llama31Config, (Phi3Config, LONGROPE): LongRopePhi3Config}


def parent_model(dense: str, seq_length: int = 4096) -> run.Config[GPTModel]:
    """Return NeMo's model of a parent, for use in your own recipe; `upcycled_from` makes a whole recipe.

    Args:
        dense: parent: a folder (only its `config.json` is needed), `hf://ORG/NAME`, `asset://NAME` or
            `nemo:///absolute/path`. Configuration and tokenizer of a parent on the hub are fetched.
        seq_length: length of the sequences to train on.

    Raises:
        UpcycleError: there is no such parent, or no NeMo model can represent it (SpecError).

    Example:
        >>> recipe.model = parent_model("/models/granite-3.3-8b-base")  # doctest: +SKIP
    """
    arch = Parent(dense).architecture or known_parent(dense) or read_architecture(tokenizer_folder(dense))
    has_experts, family = bool(arch.num_experts), find_family(arch.hf_class)
    kind, model = _CLASSES.get((family.nemo_module if family else "", has_experts), _FURTHER[has_experts])
    fields = megatron_fields(arch) | window_fields(arch)
    if arch.rope_scaling or arch.scales_in_layers or arch.scaled_embedding or arch.output_gate:
        kind = _special(arch, kind)
        fields |= nemo_scaling(arch)
    if arch.sliding_window:
        fields["cp_comm_type"] = "a2a"  # the only kind that supports a window under context parallelism
    elif kind is MistralConfig7B:  # this class has a window by default
        fields |= {"window_size": None, "cp_comm_type": None}
    if activation_of(kind.activation_func) != arch.activation:
        fields["activation_func"] = activation_function(arch.activation)
    if (layers := layers_of(arch)).func is decoder_layers or arch.moe_pattern or arch.rope_pattern:
        fields["transformer_layer_spec"] = run.Partial(layers.func, **layers.keywords)
    config = run.Config(
        kind,
        **fields,
        bias_activation_fusion=arch.activation == "silu",
        rotary_base=arch.rope_theta,
        rotary_percent=arch.rotary_percent,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        seq_length=seq_length,
        vocab_size=arch.vocab_size,
        **({"moe_grouped_gemm": True} if has_experts else {}),
    )
    return run.Config(model, config=config)


def _special(arch: Architecture, kind: type) -> Any:
    """Return NeMo's configuration class that has a parent's rotary frequencies or scaled embedding.

    Raises:
        SpecError: NeMo has no such class.
    """
    scaling = arch.rope_scaling and arch.rope_scaling["rope_type"]
    found = _SCALED.get((kind, scaling)) if scaling else kind
    lacks = {
        f"rope_scaling {scaling}": found is None,
        "a rotary embedding of its own in layers with windows": arch.local_rope_theta is not None,
        "gated delta nets, and a gate of attention": arch.output_gate,
        "a scaled embedding": arch.scaled_embedding and kind is not GemmaConfig,
    }
    if not any(lacks.values()):
        return found
    family = find_family(arch.hf_class)
    title, special = family.title if family else "a model", ", ".join(what for what, holds in lacks.items() if holds)
    raise SpecError(
        title,
        kind="refused",
        got=f"with {special} cannot be trained by NeMo",
        fix="train it in Megatron-Bridge, with the recipe of upcycled_pretraining(dense, spec, seq_length=...)",
    )
