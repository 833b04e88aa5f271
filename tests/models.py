"""Small dense checkpoints with realistic activations, and the Megatron models for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.models.activation import activation_function
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import decoder_settings
from nemo_upcycle.models.mapping import hf_names, mapping_of_hf
from nemo_upcycle.models.megatron_config import megatron_fields, moe_fields, router_fields
from nemo_upcycle.models.rotary import turn_as
from nemo_upcycle.models.sharding import hf_shapes, tensor_shape
from nemo_upcycle.models.wrapper import wrapper_of
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.spec import UpcycleSpec


#: The settings in Llama 3 8B's `config.json` that have an effect here.
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}

#: Layout size -> Megatron's setting.
PARALLEL = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


#: RoPE scaling of Llama 3.1 8B.
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_SCALING |= {"original_max_position_embeddings": 8192}


#: Kinds whose `Config` class describes a multimodal model, so that `TextConfig` is needed for the text model.
TEXT_CONFIGS = ("Gemma3", "Gemma4", "Qwen3_5")


def write_class(
    kind: str, folder: Path, *, tied: bool = False, layers: int = 4, shards: int = 1, **changes: Any
) -> Path:
    """Write a random model of a class with Hugging Face's own writer: matrices of std 0.1, norms of 0.5 to 1.5.

    With these weights, activations are of order one.

    Args:
        kind: name of the class, such as `Llama`.
        folder: folder to write.
        tied: whether the output layer shares the embedding.
        layers: number of layers.
        shards: number of weight files.
        changes: configuration settings; None means the class's default. `window` sets `sliding_window`, even to None.
    """
    import transformers

    torch.manual_seed(7)
    settings = text_sizes(tied=tied, layers=layers, **changes)
    config_class = getattr(transformers, f"{kind}TextConfig" if kind in TEXT_CONFIGS else f"{kind}Config")
    return save_random(transformers.AutoModelForCausalLM.from_config(config_class(**settings)), folder, shards)


def text_sizes(*, tied: bool = False, layers: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the configuration settings of a small model, with changes as in `write_class`."""
    sizes = {
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": tied,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
    }
    settings = {name: value for name, value in (sizes | changes).items() if value is not None}
    if "window" in changes:
        settings.pop("window", None)
        settings["sliding_window"] = changes["window"]
    return settings


def save_random(model: Any, folder: Path, shards: int = 1) -> Path:
    """Fill a transformers model with the random numbers described in `write_class`, and save it in `shards` files."""
    model = model.float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
        else:
            parameter.data.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # as large as in trained models
            buffer.uniform_(7, 7.3)
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1)
    total_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=2 * total_bytes if shards == 1 else total_bytes // shards)
    return folder


write_llama = partial(write_class, "Llama")
write_qwen2 = partial(write_class, "Qwen2", head_dim=None)
write_qwen3 = partial(write_class, "Qwen3")
#: Mistral: attention sees `window` tokens.
write_mistral = partial(write_class, "Mistral")
#: Phi 3: query, key and value are fused, and so are gate and up.
write_phi3 = partial(write_class, "Phi3", layers=2, head_dim=None, pad_token_id=0)
#: OLMo 2: norms come after attention and after the network.
write_olmo2 = partial(write_class, "Olmo2", layers=2, head_dim=None, pad_token_id=0)
#: SmolLM3: every fourth layer has no positions.
write_smollm3 = partial(write_class, "SmolLM3", tied=True, head_dim=None, pad_token_id=0)
#: EXAONE 4: attention sees a window, except in every fourth layer.
write_exaone4 = partial(write_class, "Exaone4", window=5, pad_token_id=0)


def write_nemotron_h(folder: Path, pattern: str = "M-M*-M-*-", **changes: Any) -> Path:
    """Write a random Nemotron-H with NVIDIA's tensor names; weights of std 0.1 keep activations small."""
    from safetensors.torch import save_file
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(7)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8}
    config = NemotronHConfig(**sizes, hybrid_override_pattern=pattern, **changes)
    model = NemotronHForCausalLM(config).float()
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name.replace("model.", "backbone.", 1)] = parameter.data.normal_(float("norm" in name), 0.1)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = config.to_dict() | {"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": pattern}
    del settings["layers_block_type"], settings["time_step_limit"]
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def as_transformers_5(folder: Path) -> Path:
    """Change a folder saved by transformers 4 into the form of 5.24, because an environment has only one version."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    config |= {"rope_parameters": scaling | {"rope_theta": config.pop("rope_theta")}, "transformers_version": "5.24.0"}
    config["dtype"] = config.pop("torch_dtype", None) or config["dtype"]
    path.write_text(json.dumps(config), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["extra_special_tokens"] = said.pop("additional_special_tokens", ["<unk>"])
    for name in ("added_tokens_decoder", "use_fast"):
        said.pop(name, None)
    said |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    path.write_text(json.dumps(said), encoding="utf-8")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    return folder


def write_random(folder: Path, config: dict[str, Any], deviation: float = 0.02) -> Path:
    """Write random bfloat16 weights for a `config.json` of any size, tensor by tensor; norms are ones."""
    from safetensors.torch import save_file

    from nemo_upcycle.models.hf_config import architecture_from_config

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in hf_shapes(architecture_from_config(config)).items():
        weight = torch.empty(shape, dtype=torch.bfloat16)
        weights[name] = weight.fill_(1.0) if len(shape) == 1 else weight.normal_(0, deviation, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a Hugging Face folder, or only those of the text model if the model is multimodal."""
    from safetensors.torch import load_file

    wrapper = wrapper_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {wrapper.text_name(one): found[one] for one in found if not wrapper.part_of(one)} if wrapper else found


def require_same_weights(folder: Path, *others: Path) -> None:
    """Check that Hugging Face folders contain bit-identical tensors; the file of a tensor may differ."""
    wanted = weights_of(folder)
    for other in others:
        found = weights_of(other)
        assert found.keys() == wanted.keys()
        differ = [name for name in wanted if found[name].dtype != wanted[name].dtype]
        assert differ + [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@torch.no_grad()
def hugging_face_logits(folder: Path, tokens_BS: torch.Tensor, *, strict: bool = False) -> torch.Tensor:
    """Return a folder's logits in float32, [B, S, V]; `strict` checks that no tensor is missing or unexpected."""
    from nemo_upcycle.models.hf_model import errors_only, load_model

    with errors_only():
        model, found = load_model(folder, dtype=torch.float32, output_loading_info=True)
    assert not strict or not any(found.values()), found
    return model.eval()(tokens_BS).logits


class MemorySource(DenseSource):
    """A random dense checkpoint in memory; no Hugging Face class needs to fit. Activations are of order one."""

    bytes_read = 0

    def __init__(self, architecture: Architecture, seed: int = 7) -> None:
        self.path = Path("memory")
        self.architecture = architecture
        generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        for name in hf_names(architecture):
            mapping, part, _, _ = mapping_of_hf(name, architecture)
            numbers = torch.randn(tensor_shape(mapping, part, architecture), generator=generator)
            deviation, mean = (0.2, 1.0) if mapping.role.endswith("norm") else (0.1, 0.0)
            self.tensors[name] = numbers * deviation + mean

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, index: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        slice_ = self.tensors[name][tuple(slice(*bounds) for bounds in index or ())]
        self.bytes_read += slice_.nbytes
        return slice_

    def fingerprint(self) -> dict[str, str]:
        return {}


def small_architecture(**changes: Any) -> Architecture:
    """Return the shapes of a model that runs in milliseconds."""
    sizes: dict[str, Any] = {
        "hf_class": "LlamaForCausalLM",
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 250,
        "tied_embeddings": False,
    }
    return Architecture(**(sizes | changes))


def moe_settings(arch: Architecture, spec: UpcycleSpec) -> dict[str, Any]:
    """Return the arguments with which `build_chunks` builds the model that a spec describes."""
    fields = router_fields(spec) if arch.num_experts else moe_fields(spec, arch.ffn_size, arch.num_layers)
    fields["num_experts"], fields["top_k"] = fields.pop("num_moe_experts"), fields.pop("moe_router_topk")
    fields["moe_router_dtype"] = "fp32" if spec.needs_float32_routing else None
    return fields


def build_chunks(
    dense: Path | Architecture,
    *,
    num_experts: int | None,
    top_k: int = 2,
    layout: dict[str, int] | None = None,
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> list[Any]:
    """Initialise Megatron's groups for `layout` (tp, cp, pp, vp, ep, etp) and build this rank's chunks.

    Args:
        dense: folder of the parent, or its shapes.
        num_experts: number of experts, None for a dense model.
        top_k: experts per token.
        layout: sizes other than 1. Context parallelism changes only the groups: the local attention refuses it.
        model: arguments of Megatron's `GPTModel` besides its configuration.
        changes: changed settings of the Megatron configuration; `moe_settings` returns the settings for a spec.
    """
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from nemo_upcycle.online.decoder_layers import decoder_layers

    sizes = dict.fromkeys(PARALLEL, 1) | (layout or {})
    virtual = sizes["vp"] if sizes["vp"] > 1 else None
    parallel = {PARALLEL[name]: virtual if name == "vp" else size for name, size in sizes.items()}
    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(**parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    arch = dense if isinstance(dense, Architecture) else read_architecture(dense)
    settings = {
        **megatron_fields(arch),
        "num_moe_experts": num_experts,
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": arch.expert_ffn_size or arch.ffn_size if num_experts else None,
        "moe_token_dispatcher_type": "alltoall",
        "activation_func": activation_function(arch.activation),
        "bias_activation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        **parallel,
        "context_parallel_size": 1,
        "sequence_parallel": sizes["tp"] > 1,
        "pipeline_dtype": torch.float32,
    }
    config = TransformerConfig(**(settings | changes))
    norms = decoder_settings(arch)
    rotary = {"rotary_base": int(arch.rope_theta), "rotary_percent": arch.rotary_percent}
    padded = -(-arch.vocab_size // (8 * sizes["tp"])) * 8 * sizes["tp"]
    chunks = []
    for stage in range(sizes["vp"]):
        vp_stage = stage if virtual else None
        first = ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunks.append(
            GPTModel(
                config,
                decoder_layers(config, False, vp_stage, **norms),
                padded,
                128,
                pre_process=first,
                post_process=last,
                share_embeddings_and_output_weights=arch.tied_embeddings,
                vp_stage=vp_stage,
                **({"position_embedding_type": "rope"} | rotary | (model or {})),
            )
        )
    if arch.rope_scaling:  # NeMo also scales RoPE after building
        for chunk in chunks:
            turn_as(chunk, arch)
    return chunks


def scale_embedding(model: Any) -> None:
    """Multiply the embedding of a Megatron model by sqrt(D), in the same way as NeMo's GemmaModel."""
    from nemo.collections.common.parts.utils import extend_instance
    from nemo.collections.llm.gpt.model.gemma2 import EmbeddingScalingMixin

    extend_instance(model.embedding, EmbeddingScalingMixin)


def sample_tokens(vocab_size: int, batch: int = 2, length: int = 32) -> torch.Tensor:
    """Return the same random token ids on every rank, [B, S]."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer with transformers' own writer: 256 bytes, then `<unk>`, `<s>` and `</s>` (258)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder
