"""Parents without a family here are filled by Bridge's mappings, and their networks become experts by our plan."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2Config

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, write_json
from tests.bridge.runs import SEQUENCE, VOCABULARY, run_config, train_on_ranks
from tests.distributed.ranks import run_ranks
from tests.models import save_random, text_sizes, write_class, write_qwen2
from tests.parents import write_gemma, write_wrapped
from tests.tiers import quick


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SPEC: dict[str, Any] = {"num_experts": 4, "top_k": 2}


class MiMoConfig(Qwen2Config):  # type: ignore[misc]
    """Of a class whose code is in its own repository: Qwen2's, with layers that predict further tokens."""

    model_type = "mimo"


AutoConfig.register("mimo", MiMoConfig, exist_ok=True)


def write_mimo(folder: Path, **changes: Any) -> Path:
    write_qwen2(folder, **changes)
    config = read_json(folder / "config.json")
    kind = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
    write_json(folder / "config.json", config | kind)
    tensors = load_file(folder / "model.safetensors") | {"model.mtp_layers.0.final_layernorm.weight": torch.ones(64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_qwen2_audio(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(7)
    hears = {
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "num_mel_bins": 8,
    }
    text = {"model_type": "qwen2"} | text_sizes(head_dim=None, layers=2, **changes)
    config = transformers.Qwen2AudioConfig(text_config=text, audio_config=hears | {"max_source_positions": 16})
    save_random(transformers.Qwen2AudioForConditionalGeneration(config), folder)
    published = {  # transformers 5.12 writes one part of the name twice
        name.replace("language_model.model.model.", "language_model.model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


#: Settings of a parent -> how it is written. Of Mistral 3 scores grow by positions where Transformer Engine computes.
PARENTS: dict[str, Any] = {
    "Nemotron": partial(write_class, "Nemotron", norm_eps=1e-5),
    "Gemma": write_gemma,
    "MiMo": write_mimo,
    "Qwen2Audio": write_qwen2_audio,
    "Qwen2_5_VL": partial(
        write_wrapped, kind="Qwen2_5_VL", num_attention_heads=2, num_key_value_heads=1, head_dim=128
    ),
    "Mistral3": partial(write_wrapped, kind="Mistral3"),
}
LAYOUTS: list[dict[str, int]] = [{}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parents")


def written(parents: Path, kind: str) -> Path:
    folder = parents / kind
    return folder if folder.is_dir() else PARENTS[kind](folder, vocab_size=VOCABULARY)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", PARENTS)
def test_all_but_experts_has_the_bits_of_bridges_own_loader_and_step_0_its_loss(
    parents: Path, tmp_path: Path, kind: str, layout: dict[str, int]
) -> None:
    ranks = max(layout.get("tp", 1) * layout.get("pp", 1), layout.get("ep", 1))
    for differing, gap in run_ranks(_compare, ranks, written(parents, kind), tmp_path / "run", layout):
        assert differing == []
        assert gap <= 1e-6


def _compare(parent: Path, folder: Path, layout: dict[str, int]) -> tuple[list[str], float]:
    """Fill a model with experts by the hook, and a dense one by Bridge alone.

    Returns:
        The parameters that differ, of experts from the network, and by how much the loss does; 0 with pipeline stages.
    """
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start

    model = {"transformer_layer_spec": local_layer_spec}  # what Bridge's providers of some classes do not say
    config = run_config(parent, folder, UpcycleSpec(**SPEC), style="whole", model=model, **layout)
    upcycle_on_start(config, parent, UpcycleSpec(**SPEC))
    config._checkpoint_load_required = False
    config.model.finalize()
    config.model.initialize_model_parallel(seed=1)
    (moe,) = config.model.provide_distributed_model(wrap_with_ddp=False)
    bridge = AutoBridge.from_hf_pretrained(str(parent))
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.mtp_num_layers = None
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "params_dtype",
        "pipeline_dtype",
        "bf16",
    ):
        setattr(provider, name, getattr(config.model, name))
    provider.finalize()
    (dense,) = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights([dense])
    theirs = dict(dense.named_parameters())
    differing = []
    for name, parameter in moe.named_parameters():
        layer, _, inner = name.partition(".mlp.experts.local_experts.")
        source = f"{layer}.mlp.{inner.partition('.')[2]}" if inner else name
        if "etp" in layout and inner:
            continue  # an expert is whole
        if "router" not in name and not torch.equal(theirs[source], parameter):
            differing.append(name)
    if "pp" in layout:
        return differing, 0.0
    tokens = torch.arange(SEQUENCE)[None] * 7 % VOCABULARY
    places = torch.arange(SEQUENCE)[None]
    inputs = {"input_ids": tokens, "position_ids": places, "attention_mask": None, "labels": tokens.roll(-1)}
    with torch.no_grad():
        losses = [model(**inputs) for model in (moe, dense)]
    return differing, float((losses[0] - losses[1]).abs().max() / losses[1].abs().max())
