"""Megatron weights to a Hugging Face folder: the same function, complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_checkpoint, export_weights
from nemo_upcycle.convert.megatron_weights import CheckpointWeights, LiveWeights
from nemo_upcycle.convert.safetensors_writer import SafetensorsWriter, as_bytes
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.mapping import ParamMapping
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint
from nemo_upcycle.trainers.equivalence import megatron_logits, one_rank
from nemo_upcycle.utils.files import MARKER, MODEL_MARKER, is_complete, read_json
from nemo_upcycle.utils.streams import StreamedFile
from tests.models import build_chunks, hugging_face_logits, sample_tokens, write_llama, write_tokenizer
from tests.unit.convert import exports
from tests.unit.convert.exports import EXPERTS, SPEC, TOP_K, _fill, _leaves_nothing, _Usage, write_checkpoint


dense, saved = exports.dense, exports.saved
FLOAT32 = {"dtype": torch.float32}
ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _load(folder: Path, model_class: str) -> Any:
    import transformers

    model, info = getattr(transformers, model_class).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def _hf_logits(folder: Path, model_class: str = "MixtralForCausalLM") -> torch.Tensor:
    return _load(folder, model_class)(sample_tokens(259)).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_live_upcycled_model_becomes_the_mixtral_of_the_same_function(tmp_path: Path, tied: bool) -> None:
    folder = write_llama(tmp_path / "dense", vocab_size=259, tied=tied)
    arch = read_architecture(folder).upcycled(SPEC)
    with one_rank():
        (model,) = _fill(folder, moe=True)
        expected = megatron_logits(model.eval(), sample_tokens(259))[..., :259]
        export_weights(LiveWeights(model), arch, folder, tmp_path / "hf", dtype=torch.float32)
    assert float((_hf_logits(tmp_path / "hf") - expected).abs().max()) <= 1e-5
    parent = hugging_face_logits(folder, sample_tokens(259))
    assert float((parent - expected).abs().max()) > 1e-2  # the experts do differ


def test_every_layout_exports_to_the_same_bits(saved: Path, dense: Path, tmp_path: Path) -> None:
    for name in ("one", "four"):
        export_checkpoint(saved / name, dense, tmp_path / name, spec=SPEC, **FLOAT32)
    with one_rank():
        (model,) = _fill(dense, moe=True)
        arch = read_architecture(dense).upcycled(SPEC)
        export_weights(LiveWeights(model), arch, dense, tmp_path / "live", dtype=torch.float32)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "four", "live")}
    assert weights["one"] == weights["four"] == weights["live"]
    _load(tmp_path / "four", "MixtralForCausalLM")
    marker = read_json(tmp_path / "four" / MODEL_MARKER)
    assert marker["tensors"] == len(load_file(tmp_path / "four/model.safetensors"))
    assert marker["bytes"] == arch.total_params * 4


def test_a_dense_model_comes_back_bit_by_bit(saved: Path, dense: Path, tmp_path: Path) -> None:
    export_checkpoint(saved / "dense", dense, tmp_path / "hf", **FLOAT32)
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(_hf_logits(tmp_path / "hf", "LlamaForCausalLM"), hugging_face_logits(dense, sample_tokens(259)))


def test_the_type_on_disk_is_the_one_asked_for(saved: Path, dense: Path, tmp_path: Path) -> None:
    export_checkpoint(saved / "one", dense, tmp_path / "hf", spec=SPEC)
    export_checkpoint(saved / "one", dense, tmp_path / "exact", spec=SPEC, **FLOAT32)
    half, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "exact"))
    assert all(torch.equal(half[name], exact[name].to(torch.bfloat16)) for name in exact)
    assert read_json(tmp_path / "hf/config.json")["torch_dtype"] == "bfloat16"


def test_several_shards_have_the_right_index(saved: Path, dense: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(saved / "one", dense, tmp_path / "hf", spec=SPEC, **FLOAT32)
    expected = _hf_logits(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    limit_bytes = 100_000
    writer = SafetensorsWriter(shapes, torch.float32, limit_bytes)

    def write_tensors(file: StreamedFile, names: list[str], advance: Callable[[int], None]) -> None:
        for name in names:
            file.write(as_bytes(tensors[name]))
            advance(1)

    writer.write(folder, write_tensors, "export")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 5
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = read_json(folder / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == writer.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    held = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, inside in held.items() for name in inside}
    assert all(sum(tensor.nbytes for tensor in inside.values()) <= limit_bytes for inside in held.values())
    assert torch.equal(_hf_logits(folder), expected)


def test_what_belongs_to_the_parent_travels_along(tmp_path: Path) -> None:
    extra = {"rope_scaling": ROPE_SCALING, "eos_token_id": [258, 257], "max_position_embeddings": 128}
    folder = write_tokenizer(write_llama(tmp_path / "dense", vocab_size=259, layers=2, **extra))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6,\n "eos_token_id": [258, 257]}')
    (folder / "README.md").write_text("of the parent only")
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    arch = read_architecture(folder).upcycled(SPEC)
    with one_rank():
        chunks = build_chunks(folder, num_experts=EXPERTS)
        with open_dense(folder) as source:
            upcycle_into(chunks, source, UpcycleSpec(num_experts=EXPERTS, top_k=TOP_K))
        export_weights(LiveWeights(chunks[0]), arch, folder, tmp_path / "hf", dtype=torch.float32)
    output = tmp_path / "hf"
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    copied |= {path.name for path in folder.glob("special_tokens_map.json")}  # transformers 5 writes none
    assert {path.name for path in output.iterdir()} == copied | {
        "config.json",
        "model.safetensors",
        "README.md",
        MODEL_MARKER,
    }
    assert set(read_json(output / MODEL_MARKER)["companions"]) == copied
    assert all((output / name).read_bytes() == (folder / name).read_bytes() for name in copied)
    config, parent = read_json(output / "config.json"), read_json(folder / "config.json")
    for key in ("rope_scaling", "rope_theta", "eos_token_id", "max_position_embeddings", "rms_norm_eps", "hidden_act"):
        assert config[key] == parent.get(key, config[key])  # transformers 5 has other names for some
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (EXPERTS, TOP_K)
    # Whole in one place: the scaled rotary embedding gives the parent's function only if Mixtral reads it too.
    assert float((_hf_logits(output) - _hf_logits(folder, "LlamaForCausalLM")).abs().max()) <= 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_weights_are_refused_by_name(dense: Path, tmp_path: Path, value: float) -> None:
    with one_rank():
        (model,) = _fill(dense, moe=True)
        model.decoder.layers[2].mlp.experts.local_experts[3].linear_fc2.weight.data[5, 7] = value
        arch = read_architecture(dense).upcycled(SPEC)
        name = r"model\.layers\.2\.block_sparse_moe\.experts\.3\.w2\.weight: got 1 values that are NaN"
        with _leaves_nothing(tmp_path, CheckpointError, name):
            export_weights(LiveWeights(model), arch, dense, tmp_path / "hf")


def test_a_damaged_checkpoint_is_refused(saved: Path, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "four", tmp_path / "spoiled")
    file = max((tmp_path / "spoiled/weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with _leaves_nothing(tmp_path, CheckpointError, rf"{file.name}: got damaged data of .*copy the checkpoint again"):
        export_checkpoint(tmp_path / "spoiled", dense, tmp_path / "hf", spec=SPEC)


def test_numbers_too_large_for_the_type_are_refused(dense: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC, factor=1e6)
    words = r"got larger ones, expected numbers that float16 can hold.*bfloat16 or float32"
    with _leaves_nothing(tmp_path, CheckpointError, words):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC, dtype=torch.float16)
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC, dtype=torch.bfloat16)
    with _leaves_nothing(tmp_path, UpcycleError, "type of the weights on disk: got float64"):
        export_checkpoint(checkpoint, dense, tmp_path / "double", spec=SPEC, dtype=torch.float64)


FINE = {"num_experts": 4, "top_k": 2, "granularity": 2}


def test_weights_that_the_spec_does_not_name_are_never_left_out(dense: Path, tmp_path: Path) -> None:
    spec = UpcycleSpec(**FINE, shared_experts=1)
    checkpoint = write_checkpoint(tmp_path / "ck", dense, spec)
    words = r"would leave out: got module\.decoder\.layers\.0\.mlp\.shared_experts\.\S+ .*--shared-experts"
    with _leaves_nothing(tmp_path, CheckpointError, words):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=UpcycleSpec(**FINE))
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=spec)


def test_biases_that_the_parent_does_not_have_are_never_left_out(dense: Path, tmp_path: Path) -> None:
    qwen = write_llama(tmp_path / "qwen", vocab_size=259)
    config = read_json(qwen / "config.json") | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (qwen / "config.json").write_text(json.dumps(config))
    checkpoint = write_checkpoint(tmp_path / "ck", qwen, SPEC)
    words = r"self_attention\.linear_qkv\.bias.* and 1 more.*its own parent"
    with _leaves_nothing(tmp_path, CheckpointError, words):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_what_is_no_weight_is_left_out(dense: Path, tmp_path: Path, prefix: str) -> None:
    names = [f"{kind}optimizer.state.exp_avg.decoder.layers.0.x" for kind in ("", "chained_0.", "chained_11.")]
    names.append(f"{prefix}decoder.layers.0.mlp._extra_state")
    extra = {name: torch.zeros(3) for name in names}
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC, prefix=prefix, **extra)
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
    assert is_complete(tmp_path / "hf")


@pytest.mark.parametrize("output", ["run/pretrain", "run/pretrain/ck", "run/pretrain/ck/hf", "run/dense", "run"])
def test_checkpoint_and_parent_are_never_replaced(dense: Path, tmp_path: Path, output: str) -> None:
    parent = Path(shutil.copytree(dense, tmp_path / "run/dense"))
    checkpoint = write_checkpoint(tmp_path / "run/pretrain/ck", dense, SPEC)
    for folder in (tmp_path / "run", tmp_path / "run/pretrain", parent):
        (folder / MARKER).write_text('{"stage": "pretrain"}')
    with _leaves_nothing(tmp_path, UpcycleError, "expected a folder apart from|not made by nemo-upcycle export"):
        export_checkpoint(checkpoint, parent, tmp_path / output, spec=SPEC)
    with _leaves_nothing(tmp_path, UpcycleError, "expected a folder apart from|not made by nemo-upcycle export"):
        export_weights(LiveWeights(torch.nn.Module()), read_architecture(parent), parent, parent)
    export_checkpoint(checkpoint, parent, tmp_path / "run/hf", spec=SPEC)
    first = (tmp_path / "run/hf/model.safetensors").stat().st_ino
    export_checkpoint(checkpoint, parent, tmp_path / "run/hf", spec=SPEC)
    assert (tmp_path / "run/hf/model.safetensors").stat().st_ino != first


def test_a_second_export_into_the_same_folder_waits_for_none(dense: Path, tmp_path: Path) -> None:
    """It is refused while the first goes on, which then is whole."""
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    refused = []

    class Interrupted(CheckpointWeights):
        def read(self, mapping: ParamMapping, layer: int, expert: int) -> torch.Tensor:
            if not refused:
                with pytest.raises(UpcycleError, match="another process writing it") as error:
                    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
                refused.append(error)
            return super().read(mapping, layer, expert)

    arch = read_architecture(dense).upcycled(SPEC)
    export_weights(Interrupted(checkpoint), arch, dense, tmp_path / "hf", dtype=torch.float32)
    assert refused
    export_checkpoint(checkpoint, dense, tmp_path / "alone", spec=SPEC, **FLOAT32)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "alone")]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "ck", "hf"]


def test_memory_is_given_back_on_the_way(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    export_checkpoint(checkpoint, dense, tmp_path / "seldom", spec=SPEC)
    released, release = [], DistributedCheckpoint.release
    monkeypatch.setattr("nemo_upcycle.convert.megatron_weights._RELEASE_BYTES", 100_000)
    monkeypatch.setattr(DistributedCheckpoint, "release", lambda self: (released.append(self), release(self)))
    export_checkpoint(checkpoint, dense, tmp_path / "often", spec=SPEC)
    assert len(released) > 5
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("seldom", "often")]
    assert files[0] == files[1]


def test_a_full_disk_is_refused_and_the_earlier_export_kept(
    saved: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**6, 10**6 - 1000, 1000))
    with _leaves_nothing(tmp_path, UpcycleError, r"disk space.*got 1000 bytes free.*Fix: free some space"):
        export_checkpoint(saved / "one", dense, tmp_path / "hf", spec=SPEC)
    monkeypatch.undo()
    export_checkpoint(saved / "one", dense, tmp_path / "hf", spec=SPEC)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**6, 10**6 - 1000, 1000))
    with _leaves_nothing(tmp_path, UpcycleError, "disk space"):
        export_checkpoint(saved / "one", dense, tmp_path / "hf", spec=SPEC)
    assert is_complete(tmp_path / "hf")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (None, r"spec: got none, expected num_experts=4"),
        (UpcycleSpec(num_experts=8), r"spec: got num_experts=8, expected num_experts=4"),
    ],
)
def test_a_spec_of_another_model_is_refused(
    saved: Path, dense: Path, tmp_path: Path, spec: UpcycleSpec | None, words: str
) -> None:
    with _leaves_nothing(tmp_path, SpecError, words):
        export_checkpoint(saved / "one", dense, tmp_path / "hf", spec=spec)


def test_a_spec_of_a_dense_model_is_refused(saved: Path, dense: Path, tmp_path: Path) -> None:
    with _leaves_nothing(tmp_path, SpecError, r"spec: got .*expected none: .* is a dense model"):
        export_checkpoint(saved / "dense", dense, tmp_path / "hf", spec=SPEC)


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        ({"intermediate_size": 128}, "another parent"),
        ({"vocab_size": 400}, r"embed_tokens\.weight: got \[272, 64\], expected \[400, 64\]"),
        ({"num_hidden_layers": 5}, r"num_layers of .*got 4, expected 5"),
        ({"num_hidden_layers": 3}, r"num_layers of .*got 4, expected 3"),
        ({"tie_word_embeddings": True}, "tied_embeddings of .*got False, expected True"),
    ],
)
def test_a_checkpoint_of_another_parent_is_refused(saved: Path, tmp_path: Path, parent: dict, words: str) -> None:
    other = write_llama(tmp_path / "other", **({"vocab_size": 259} | parent))
    with _leaves_nothing(tmp_path, CheckpointError, words):
        export_checkpoint(saved / "four", other, tmp_path / "hf", spec=SPEC)


def test_a_slice_of_a_checkpoint_is_put_together_from_all_ranks(saved: Path, dense: Path) -> None:
    with open_dense(dense) as source:
        expected = source.read("model.layers.1.self_attn.o_proj.weight", [(0, 64), (20, 50)]).clone()
    checkpoint = DistributedCheckpoint(saved / "four/weights")
    name = "module.decoder.layers.self_attention.linear_proj.weight"
    assert checkpoint.shape(name) == (4, 64, 64)
    assert checkpoint.dtype(name) == torch.float32
    assert torch.equal(checkpoint.read(name, [(1, 2), (0, 64), (20, 50)])[0], expected)
    with pytest.raises(CheckpointError, match=r"does not exist\. Did you mean 'module\.decoder"):
        checkpoint.read("module.decoder.layers.self_attention.linear_pro.weight")
    assert json.dumps(sorted(checkpoint.names()))
