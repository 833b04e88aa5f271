"""Parents without a family here are filled by Bridge's mappings, and their networks become experts by our plan."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.cli.main import main
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint
from nemo_upcycle.utils.files import read_json, write_json
from tests.bridge.runs import SEQUENCE, SPEC, VOCABULARY, fill, refusal, train_on_ranks
from tests.distributed.ranks import run_ranks
from tests.models import save_random, text_sizes, write_class, write_qwen2
from tests.parents import write_gemma, write_wrapped
from tests.tiers import quick


def write_mimo(folder: Path, **changes: Any) -> Path:
    from benchmarks.bridge_parents import MiMoConfig

    write_qwen2(folder, **changes)
    config = read_json(folder / "config.json")
    kind = {"architectures": ["MiMoForCausalLM"], "model_type": MiMoConfig.model_type, "num_nextn_predict_layers": 1}
    write_json(folder / "config.json", config | kind)
    tensors = load_file(folder / "model.safetensors") | {"model.mtp_layers.0.final_layernorm.weight": torch.ones(64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_qwen2_audio(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(7)
    hears = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32}
    hears |= {"num_mel_bins": 8, "max_source_positions": 16}
    text = {"model_type": "qwen2"} | text_sizes(head_dim=None, layers=2, **changes)
    config = transformers.Qwen2AudioConfig(text_config=text, audio_config=hears)
    save_random(transformers.Qwen2AudioForConditionalGeneration(config), folder)
    published = {  # transformers 5.12 writes one part of the name twice
        name.replace("language_model.model.model.", "language_model.model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


#: Class -> how a parent of it is written.
PARENTS: dict[str, Any] = {
    "Nemotron": partial(write_class, "Nemotron", norm_eps=1e-5),
    "Gemma": write_gemma,
    "MiMo": write_mimo,
    "Qwen2Audio": write_qwen2_audio,
    "Qwen2_5_VL": partial(
        write_wrapped, kind="Qwen2_5_VL", hidden_size=256, num_attention_heads=2, num_key_value_heads=2
    ),
    "Mistral3": partial(write_wrapped, kind="Mistral3"),
}
LAYOUTS: list[dict[str, int]] = [{}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}]
#: Further fields of a spec: copies in every second layer; shards of copies beside a shared expert.
FIELDS: list[dict[str, Any]] = [
    {"moe_layers": "every-2"},
    {"num_experts": 8, "top_k": 2, "granularity": 2, "shared_experts": 1, "router_std": 1.0},
]
#: Bridge's own model of these does not compute so: its embeddings are not cut along the sequence.
NOT_IN_SEQUENCE = "Qwen2Audio"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parents")


def written(parents: Path, kind: str) -> Path:
    folder = parents / kind
    return folder if folder.is_dir() else (PARENTS | REFUSED)[kind](folder, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    ("kind", "layout", "fields"),
    quick(
        [
            *((kind, layout, {}) for kind in PARENTS for layout in LAYOUTS),
            *(("Nemotron", layout, fields) for layout in ({"pp": 2}, {"tp": 2}) for fields in FIELDS),
        ],
        ("Nemotron", LAYOUTS[-1], {}),
        ("MiMo", {"pp": 2}, {}),
        ("Qwen2_5_VL", {"ep": 2}, {}),
        ("Nemotron", {"tp": 2}, FIELDS[1]),
    ),
    ids=str,
)
def test_all_but_experts_has_the_bits_of_bridges_own_loader_and_step_0_its_loss(
    parents: Path, tmp_path: Path, kind: str, layout: dict[str, int], fields: dict[str, Any]
) -> None:
    ranks = max(layout.get("tp", 1) * layout.get("pp", 1), layout.get("ep", 1))
    computes = "pp" not in layout and not (kind == NOT_IN_SEQUENCE and "tp" in layout)
    arguments = (written(parents, kind), tmp_path / "run", layout, SPEC | fields, computes)
    for differing, gap in run_ranks(_compare, ranks, *arguments):
        assert differing == []
        assert gap <= (1e-5 if "granularity" in fields else 1e-6)
    receipt = read_json(tmp_path / "run/receipt.json")
    assert receipt["exact"], receipt["inexact_because"]
    assert receipt["left_out"].keys() == ({"mtp_layers"} if kind == "MiMo" else set())
    assert receipt["bytes_read"] == receipt["bytes_needed"]


def _compare(
    parent: Path, folder: Path, layout: dict[str, int], fields: dict[str, Any], computes: bool
) -> tuple[list[str], float]:
    """Fill a model with experts by the hook, and a dense one by Bridge alone.

    Returns:
        The parameters that differ, of experts from the network; and by how much the losses of one text do.
    """
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    import benchmarks.bridge_parents  # noqa: F401  # registers MiMo's configuration

    model = {} if "moe_layers" in fields else {"transformer_layer_spec": local_layer_spec}  # Mistral 3 has its own
    moe, made_by = fill(parent, folder, fields, style="whole", model=model, **layout)
    bridge = AutoBridge.from_hf_pretrained(str(parent))
    provider = bridge.to_megatron_provider(load_weights=False)
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    for name in (*sizes, "params_dtype", "pipeline_dtype", "bf16"):
        setattr(provider, name, getattr(made_by, name))
    provider.mtp_num_layers, provider.transformer_layer_spec = None, local_layer_spec
    provider.finalize()
    (dense,) = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights([dense])
    theirs, differing = dict(dense.named_parameters()), []
    for name, parameter in moe.named_parameters():
        layer, _, inner = name.partition(".mlp.experts.local_experts.")
        source = theirs.get(f"{layer}.mlp.{inner.partition('.')[2]}" if inner else name)
        is_ours = "router" in name or "shared_experts" in name or (inner and source.shape != parameter.shape)
        if not is_ours and not torch.equal(source, parameter):
            differing.append(name)
    tokens = torch.arange(SEQUENCE)[None] * 7 % VOCABULARY
    inputs = {"position_ids": torch.arange(SEQUENCE)[None], "attention_mask": None, "labels": tokens.roll(-1)}
    if not computes:
        return differing, 0.0
    with torch.no_grad():
        made = [model(input_ids=tokens, **inputs) for model in (moe, dense)]
    ours, wanted = (losses[0] if isinstance(losses, tuple) else losses for losses in made)
    return differing, float((ours - wanted).abs().max() / wanted.abs().max())


def test_a_known_parent_becomes_the_same_through_bridge(dense: Path, tmp_path: Path) -> None:
    """Of a Llama the two receipts have the same hashes of every parameter, and what it is made of."""
    made = {}
    for style in ("provider", "whole"):
        run_ranks(_fill, 1, dense, tmp_path / style, style)
        receipt = read_json(tmp_path / style / "receipt.json")
        made[style] = {one["name"]: one["sha256"] for one in receipt.pop("parameters")}, receipt["total_params"]
    assert made["provider"] == made["whole"]


def _fill(parent: Path, folder: Path, style: str) -> None:
    fill(parent, folder, SPEC | {"method": "noise"}, style=style)


@pytest.mark.full
def test_a_resumed_training_has_the_same_bits(parents: Path, tmp_path: Path) -> None:
    parent, options = written(parents, "Nemotron"), {"lr": 1e-3, "ep": 2}
    train_on_ranks(2, parent, tmp_path / "whole", SPEC, steps=3, **options)
    for steps in (2, 3):
        train_on_ranks(2, parent, tmp_path / "twice", SPEC, steps=steps, **options)
    train_on_ranks(2, parent, tmp_path / "dense", None, ep=1, tp=2)
    whole, twice, first = (
        DistributedCheckpoint(tmp_path / name)
        for name in ("whole/iter_0000003", "twice/iter_0000003", "twice/iter_0000002")
    )
    names = [name for name in whole.names() if "optimizer" not in name and whole.shape(name)]
    assert any(".experts." in name for name in names)
    assert all(torch.equal(whole.read(name), twice.read(name)) for name in names)
    assert not all(torch.equal(whole.read(name), first.read(name)) for name in names)
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "hf")]) == 2


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """Write the configuration alone of a class of transformers."""
    config = getattr(transformers, f"{name}Config")(**changes)
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(folder)
    return folder


REFUSED: dict[str, Any] = {
    "Gemma2": partial(write_class, "Gemma2", head_dim=16),
    **{kind: partial(write_wrapped, kind=kind) for kind in ("Gemma3", "Exaone4_5_", "Qwen3VL")},
    "GptOss": partial(write_config, name="GptOss", num_hidden_layers=2),
    "Falcon": partial(write_config, name="Falcon"),
}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, "ignore num_moe_experts") for kind in ("Gemma2", "Gemma3", "Exaone4_5_", "Qwen3VL")),
        ("GptOss", "with 128 experts"),
        ("Falcon", "a model that Megatron-Bridge does not take"),
    ],
)
def test_a_parent_whose_layers_get_no_experts_is_refused(parents: Path, kind: str, words: str) -> None:
    from nemo_upcycle.trainers.bridge.bridged import bridged_provider

    with pytest.raises(UpcycleError, match=words):
        bridged_provider(written(parents, kind), UpcycleSpec(**SPEC))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint.also_save_hf_checkpoint": True}, "also_save_hf_checkpoint: got True"),
        ({"model.rotary_base": 10}, "rotary_base: got 10"),
        ({"model.normalization": "RMSNorm"}, "normalization: got RMSNorm"),
        ({"model.moe_ffn_hidden_size": 48}, "moe_ffn_hidden_size: got 48"),
        ({"model.moe_router_topk": 1}, "moe_router_topk: got 1"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_filled_is_refused_at_once(
    parents: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    assert words in refusal(written(parents, "Nemotron"), tmp_path / "run", SPEC, change)
