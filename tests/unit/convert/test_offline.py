"""Converting without a training job: the bits of upcycling and exporting, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.cpu.one_rank import one_rank
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.utils.files import MODEL_MARKER, is_complete, read_json, write_json
from tests.models import build_chunks, moe_settings, sample_tokens, write_llama, write_qwen3
from tests.unit.convert import conversions
from tests.unit.convert.conversions import COPY, FINE, SPEC, _convert, _same_bits, _tensors


dense, copy = conversions.dense, conversions.copy
#: name -> spec, settings of the Megatron model that it is made in
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copy": (COPY, {}),
    "noise": (COPY | {"method": "noise", "noise_std": 0.1}, {}),
    "drop": (COPY | {"method": "drop", "router_init": "uniform"}, {}),
    "granular": (FINE, {"moe_ffn_hidden_size": 48, "moe_router_dtype": "fp32"}),
    "granular drop": (FINE | {"method": "drop"}, {"moe_ffn_hidden_size": 48, "moe_router_dtype": "fp32"}),
    "shared": (
        FINE | {"shared_experts": 1},
        {"moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 48, "moe_router_dtype": "fp32"},
    ),
    "mixed": (COPY | {"moe_layers": "every-2"}, {"moe_layer_freq": [1, 0, 1, 0]}),
    "before top-k": (
        COPY | {"router_order": "softmax_topk", "router_init": "zero"},
        {"moe_router_pre_softmax": True},
    ),
}


def _load(folder: Path) -> Any:
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def _logits(folder: Path, vocab_size: int = 259) -> torch.Tensor:
    return _load(folder)(sample_tokens(vocab_size)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_offline_and_online_give_the_same_bits(dense: Path, tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    fields, settings = CASES[case]
    spec = UpcycleSpec(**fields)
    with one_rank():
        (model,) = build_chunks(dense, num_experts=spec.num_experts, top_k=spec.top_k, params_dtype=dtype, **settings)
        with open_dense(dense) as source:
            upcycle_into([model], source, spec)
        arch = read_architecture(dense).upcycled(spec)
        export_weights(LiveWeights(model), arch, dense, tmp_path / "online", dtype=dtype)
    done = _convert(dense, tmp_path / "offline", spec, dtype=dtype)
    _same_bits(tmp_path / "online", tmp_path / "offline")
    configs = [read_json(tmp_path / name / "config.json") for name in ("online", "offline")]
    assert configs[0] == configs[1]
    assert (done.exact, done.hf_class) == (spec.is_exact and dtype is torch.float32, arch.hf_class)
    assert done.bytes_written == done.bytes_total >= arch.total_params * dtype.itemsize
    if spec.is_exact and dtype is torch.float32:
        assert float((_logits(tmp_path / "offline") - _logits(dense)).abs().max()) <= 1e-5
    else:
        _load(tmp_path / "offline")


@pytest.mark.parametrize(
    ("write", "fields", "hf_class"),
    [
        (write_qwen3, {}, "Qwen3MoeForCausalLM"),
        (write_qwen3, {"router_score": "sigmoid", "routed_scaling_factor": 2.5}, "Glm4MoeForCausalLM"),
        (write_llama, {"router_order": "softmax_topk", "router_init": "zero"}, "Qwen2MoeForCausalLM"),
    ],
)
def test_a_tied_parent_of_every_class_has_the_same_bits_offline_and_online(
    tmp_path: Path, write: Any, fields: dict[str, Any], hf_class: str
) -> None:
    dense, spec = write(tmp_path / "dense", tied=True, layers=2), UpcycleSpec(**COPY | fields)
    arch = read_architecture(dense)
    with one_rank():
        (model,) = build_chunks(dense, **moe_settings(arch, spec))
        with open_dense(dense) as source:
            upcycle_into([model], source, spec)
        export_weights(LiveWeights(model), arch.upcycled(spec), dense, tmp_path / "online", dtype=torch.float32)
    assert _convert(dense, tmp_path / "offline", spec).hf_class == hf_class
    _same_bits(tmp_path / "online", tmp_path / "offline")
    assert float((_logits(tmp_path / "online", 250) - _logits(dense, 250)).abs().max()) <= 1e-5


@pytest.mark.parametrize("fields", [COPY, FINE], ids=["copy", "granular"])
def test_a_qwen3_with_biases_of_the_attention_keeps_them_and_its_function(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    dense = write_qwen3(tmp_path / "dense", vocab_size=259, layers=2, attention_bias=True)
    done = _convert(dense, tmp_path / "moe", UpcycleSpec(**fields))
    assert (done.hf_class, done.exact) == ("Qwen3MoeForCausalLM", True)
    assert read_json(tmp_path / "moe/config.json")["attention_bias"] is True
    assert read_architecture(tmp_path / "moe").attention_out_bias
    assert any("vLLM" in caveat for caveat in done.caveats)  # which drops one of them
    with open_dense(dense) as source:
        biases = {name for name in source.names() if name.endswith(".bias")}
    assert len(biases) == 4 * 2
    parent = _logits(dense)
    assert float(parent.abs().max()) > 0.1
    assert float((_logits(tmp_path / "moe") - parent).abs().max()) <= 1e-5 * float(parent.abs().max())


def test_a_qwen3_with_biases_of_the_attention_is_refused_online(tmp_path: Path) -> None:
    """Megatron has one setting for the biases of the attention's output and of the experts."""
    dense = write_qwen3(tmp_path / "dense", layers=2, attention_bias=True)
    spec = UpcycleSpec(**COPY)
    with one_rank():
        (model,) = build_chunks(dense, **moe_settings(read_architecture(dense), spec))
        with open_dense(dense) as source, pytest.raises(UpcycleError, match=r"bias"):
            upcycle_into([model], source, spec)


@pytest.mark.parametrize(
    "change", [{"architectures": None}, {"hidden_act": "swish"}, {"architectures": None, "model_type": "llama"}]
)
def test_a_parent_that_says_less_or_in_other_words_is_converted(tmp_path: Path, change: dict[str, Any]) -> None:
    dense = write_llama(tmp_path / "dense", vocab_size=259, layers=2)
    _convert(dense, tmp_path / "wanted", UpcycleSpec(**COPY))
    config = read_json(dense / "config.json") | change
    left = {key: value for key, value in config.items() if value is not None or key not in change}
    (dense / "config.json").write_text(json.dumps(left), encoding="utf-8")
    _convert(dense, tmp_path / "moe", UpcycleSpec(**COPY))
    _same_bits(tmp_path / "wanted", tmp_path / "moe")
    assert read_json(tmp_path / "wanted/config.json") == read_json(tmp_path / "moe/config.json")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fields", [COPY, FINE, FINE | {"shared_experts": 2}], ids=["copy", "granular", "shared"])
def test_a_qwen2_keeps_its_biases_and_its_function(tmp_path: Path, fields: dict[str, Any], tied: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "dense")
    done = _convert(tmp_path / "dense", tmp_path / "moe", UpcycleSpec(**fields))
    assert done.hf_class == "Qwen2MoeForCausalLM"
    parent = _logits(tmp_path / "dense")
    assert float(parent.abs().max()) > 0.1
    assert float((_logits(tmp_path / "moe") - parent).abs().max()) <= 1e-5


def test_half_precision_and_small_blocks_change_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices that are too large to be kept are made again for every copy."""
    _convert(dense, tmp_path / "once", UpcycleSpec(**FINE), dtype=torch.bfloat16)
    monkeypatch.setattr("nemo_upcycle.convert.expansion.BLOCK_BYTES", 1000)
    monkeypatch.setattr("nemo_upcycle.convert.expansion.KEPT_BYTES", 0)
    _convert(dense, tmp_path / "blocks", UpcycleSpec(**FINE), dtype=torch.bfloat16, max_shard_bytes=50_000)
    assert len(list((tmp_path / "blocks").glob("*.safetensors"))) > 10
    _same_bits(tmp_path / "once", tmp_path / "blocks")
    _load(tmp_path / "blocks")


def test_everything_of_the_parent_travels_along(dense: Path, tmp_path: Path) -> None:
    done = _convert(dense, tmp_path / "moe")
    marker = read_json(tmp_path / "moe" / MODEL_MARKER)
    assert marker["bytes"] == done.bytes_total
    assert marker["tensors"] == done.tensors == len(_tensors(tmp_path / "moe"))
    assert "tokenizer.json" in marker["companions"]
    assert {path.name for path in tmp_path.iterdir()} == {"moe"}
    assert not [path.name for path in (tmp_path / "moe").iterdir() if path.name.startswith(".")]


def test_the_same_again_is_done_already_and_another_is_refused(dense: Path, tmp_path: Path) -> None:
    (not_ours := tmp_path / "other").mkdir()
    (not_ours / "notes").write_text("mine")
    first = _convert(dense, tmp_path / "moe")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}
    again = _convert(dense, tmp_path / "moe")
    assert (first.files_kept, again.files_kept, again.bytes_written) == (0, again.files, 0)
    with pytest.raises(UpcycleError, match="finished folder made from something else"):
        _convert(dense, tmp_path / "moe", UpcycleSpec(num_experts=4, top_k=3))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}
    with pytest.raises(UpcycleError, match="files that are not ours"):
        _convert(dense, not_ours)
    for output in (dense, dense / "moe", dense.parent):
        with pytest.raises(UpcycleError, match=r"got (the same folder|one inside the other)"):
            _convert(dense, output)
    assert is_complete(tmp_path / "moe")


@pytest.mark.parametrize(
    "made_from",
    [None, [], "plan", {}, {"spec": None}, {"spec": {"top_k": 99}}, {"spec": {"top_q": 2}}, {"spec": {"method": []}}],
    ids=str,
)
def test_a_plan_that_is_none_is_something_else(dense: Path, tmp_path: Path, made_from: object) -> None:
    _convert(dense, tmp_path / "moe")
    write_json(tmp_path / "moe" / MODEL_MARKER, read_json(tmp_path / "moe" / MODEL_MARKER) | {"made_from": made_from})
    with pytest.raises(UpcycleError, match="finished folder made from something else"):
        _convert(dense, tmp_path / "moe")


def test_a_tokenizer_that_comes_later_is_added(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    _convert(copy, tmp_path / "moe")
    (tmp_path / "tokenizer.json").rename(copy / "tokenizer.json")
    assert _convert(copy, tmp_path / "moe").bytes_written == 0
    assert (tmp_path / "moe/tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert "tokenizer.json" in read_json(tmp_path / "moe" / MODEL_MARKER)["companions"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "half a file"])
def test_a_finished_folder_that_lost_a_file_is_not_done(dense: Path, tmp_path: Path, file: str) -> None:
    _convert(dense, tmp_path / "moe")
    if file == "half a file":
        file = "model.safetensors"
        whole = (tmp_path / "moe" / file).read_bytes()
        (tmp_path / "moe" / file).write_bytes(whole[: len(whole) // 2])
    else:
        (tmp_path / "moe" / file).unlink()
    with pytest.raises(UpcycleError, match=rf"moe: got no whole {file}.*Fix: remove the folder and run"):
        _convert(dense, tmp_path / "moe")


def test_an_empty_folder_is_filled_by_whatever_name(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "here")
    assert _convert(dense, Path()).output == tmp_path / "here"
    _convert(dense, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real"]
    _same_bits(tmp_path / "here", tmp_path / "link")


def test_a_folder_called_tokenizer_is_left_alone(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer").mkdir()
    _convert(copy, tmp_path / "moe")
    assert not (tmp_path / "moe/tokenizer").exists()
    assert (tmp_path / "moe/tokenizer.json").is_file()


def test_a_type_that_no_file_holds_is_refused_before_anything_is_written(copy: Path, tmp_path: Path) -> None:
    for file in copy.glob("*.safetensors"):
        save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UpcycleError, match=r"got float64, expected .*Fix: add --dtype float32"):
        _convert(copy, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    done = _convert(copy, tmp_path / "moe", dtype=torch.float32)
    assert done.inexact_because[0].startswith("float64 weights are rounded to float32 (")


@pytest.mark.parametrize(
    ("stored", "dtype", "is_lossless"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, False),
    ],
)
def test_a_type_that_rounds_is_not_exact(
    copy: Path, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, is_lossless: bool
) -> None:
    for file in copy.glob("*.safetensors"):
        save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    done = _convert(copy, tmp_path / "moe", dtype=dtype)
    assert done.exact is is_lossless
    names = [str(one).removeprefix("torch.") for one in (stored, dtype)]
    assert is_lossless or done.inexact_because[0].startswith(f"{names[0]} weights are rounded to {names[1]} (model.")


def test_a_factor_that_a_type_rounds_is_told(copy: Path, tmp_path: Path) -> None:
    for file in copy.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    spec = UpcycleSpec(num_experts=6, top_k=3, granularity=3)
    done = _convert(copy, tmp_path / "moe", spec)
    assert done.inexact_because == ("the factor 3 on the down projection is rounded in bfloat16",)
    assert _convert(copy, tmp_path / "float32", spec, dtype=torch.float32).exact
    assert _convert(copy, tmp_path / "even", UpcycleSpec(num_experts=4, top_k=2, granularity=2)).exact


def test_a_source_is_the_same_however_it_is_spelled(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _convert(dense, tmp_path / "moe")
    monkeypatch.chdir(dense.parent)
    again = _convert(Path(dense.name), tmp_path / "moe")
    assert (again.files_kept, again.bytes_written) == (first.files, 0)


def test_norms_with_more_digits_than_the_embedding_are_told(copy: Path, tmp_path: Path) -> None:
    """Without `dtype`, all is written in the embedding's type."""
    for file in copy.glob("*.safetensors"):
        half = {name: tensor if tensor.dim() == 1 else tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file, {"format": "pt"})
    done = _convert(copy, tmp_path / "moe")
    (reason,) = done.inexact_because
    assert reason == ("float32 weights are rounded to float16 (model.layers.0.input_layernorm.weight and 8 more)")


def test_more_parents_than_copies_are_refused(dense: Path, tmp_path: Path) -> None:
    spec = UpcycleSpec(num_experts=4, top_k=2, granularity=2)
    words = "dense sources: got 3, expected at most 2, the copies"
    with open_dense([dense, dense, dense]) as source, pytest.raises(SpecError, match=words):
        convert(source, tmp_path / "moe", spec)
    assert not list(tmp_path.iterdir())


def test_weights_without_config_are_refused_before_anything_is_written(copy: Path, tmp_path: Path) -> None:
    """A NeMo checkpoint can be read, but has neither config.json nor a tokenizer of Hugging Face's."""
    with open_dense(copy) as source:
        (copy / "config.json").unlink()
        with pytest.raises(CheckpointError, match="export the checkpoint first"):
            convert(source, tmp_path / "moe", SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_sliding_window_with_what_mixtral_lacks_is_named(copy: Path, tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    (copy / "config.json").write_text(json.dumps(read_json(copy / "config.json") | mistral))
    with pytest.raises(SpecError, match=r"shared experts \(Mixtral\); .*a sliding window \(Qwen2-MoE"):
        _convert(copy, tmp_path / "moe", UpcycleSpec(**FINE, shared_experts=1))
    _convert(copy, tmp_path / "moe")


@pytest.mark.parametrize(
    ("fields", "parent", "words"),
    [
        ({"router_score": "sigmoid", "moe_layers": "every-2"}, {}, "dense layers behind an MoE layer .Glm4-MoE"),
        (
            {"routed_scaling_factor": 2.5},
            {},
            "got a routed_scaling_factor .*or route by router_score='sigmoid' with ",
        ),
        ({"shared_experts": 1}, {"head_dim": 32}, "heads that do not make up the hidden size"),
        ({}, {"mlp_bias": True}, "got biases of the feed-forward network"),
        ({}, {"attention_bias": True}, "got a bias of the attention's output"),
        ({"moe_layers": (9,)}, {}, "moe_layers: got 9"),
    ],
)
def test_what_no_class_can_hold_is_refused(
    tmp_path: Path, fields: dict[str, Any], parent: dict[str, Any], words: str
) -> None:
    folder = write_llama(tmp_path / "dense", layers=2, **parent)
    with pytest.raises(SpecError, match=words):
        _convert(folder, tmp_path / "moe", UpcycleSpec(**(COPY | fields)))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
