"""Megatron's and NeMo's own checkpoints, in several layouts, are read like the original Hugging Face folders."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_upcycle import open_dense
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.online.upcycle import fill_chunks
from nemo_upcycle.sources.megatron_checkpoint import MegatronCheckpoint
from tests.distributed.ranks import run_ranks
from tests.folders import SPEC
from tests.models import LLAMA3_SCALING, build_chunks, write_llama, write_qwen2, write_qwen3, write_tokenizer
from tests.unit.convert.exports import save


LAYOUTS = {"one": {}, "tp2pp2": {"tp": 2, "pp": 2}}


def dump_context(model: Any, folder: Path) -> None:
    """Write a model's context with NeMo, as its trainer does."""
    from nemo import lightning as nl
    from nemo.lightning.io.pl import TrainerContext

    trainer = nl.Trainer(accelerator="cpu", devices=1)
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(folder, yaml_attrs=["model"])


def _write_contexts(tokenizer: str, output: str) -> None:
    from nemo.collections import llm
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config8B, Qwen3Model

    sizes = {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
    sizes |= {"rotary_base": 100000, "layernorm_epsilon": 1e-5}
    llama = llm.Llama31Config8B(**sizes, num_layers=4, apply_rope_fusion=False)
    qwen3 = Qwen3Config8B(**sizes, num_layers=2, kv_channels=16, vocab_size=259)
    for name, model, config in (("context", llm.LlamaModel, llama), ("qwen3/context", Qwen3Model, qwen3)):
        dump_context(model(config, tokenizer=AutoTokenizer(tokenizer)), Path(output, name))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return write_tokenizer(write_llama(folder, vocab_size=259, rope_scaling=LLAMA3_SCALING))


@pytest.fixture(scope="module")
def saved(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NeMo checkpoints of one model, saved on one rank and on four ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(_write_contexts, 1, str(parent), str(folder), process_group=False)
    for name, layout in LAYOUTS.items():
        ranks = layout.get("tp", 1) * layout.get("pp", 1)
        run_ranks(save, ranks, str(parent), str(folder / name / "weights"), False, layout, "module.")
        shutil.copytree(folder / "context", folder / name / "context")
    return folder


@pytest.fixture
def nemo(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint for a test to change."""
    return Path(shutil.copytree(saved / "tp2pp2", tmp_path / "nemo"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_slice_has_the_bits_of_the_hugging_face_folder(saved: Path, parent: Path, name: str) -> None:
    numbers = random.Random(1)
    with open_dense(saved / name) as checkpoint, open_dense(parent) as expected:
        assert isinstance(checkpoint, MegatronCheckpoint)
        assert checkpoint.architecture == replace(expected.architecture, max_positions=131072)
        assert set(checkpoint.names()) == set(expected.names())
        for tensor in expected.names():
            shape = expected.shape(tensor)
            assert checkpoint.shape(tensor) == shape
            assert checkpoint.dtype(tensor) == expected.dtype(tensor)
            assert torch.equal(checkpoint.read(tensor), expected.read(tensor))
            for _ in range(8):
                bounds = [tuple(sorted(numbers.choices(range(size + 1), k=2))) for size in shape]
                before = checkpoint.bytes_read
                got = checkpoint.read(tensor, bounds)
                assert torch.equal(got, expected.read(tensor, bounds)), (tensor, bounds)
                assert checkpoint.bytes_read - before == got.nbytes


@pytest.mark.usefixtures("megatron")
def test_a_run_can_start_from_one_and_from_several(saved: Path, parent: Path) -> None:
    one, four = f"nemo://{saved / 'one'}", f"nemo://{saved / 'tp2pp2'}"
    for paths, reasons in (([one], 0), ([one, four], 1)):
        receipt = fill_chunks(build_chunks(parent, num_experts=4), paths, SPEC, "mean")
        assert sum(name.endswith(".metadata") for name in receipt.source_files) == len(paths)
        assert len(receipt.inexact_because) == reasons


def test_plain_megatron_needs_a_config_json(saved: Path, parent: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "one/weights", tmp_path / "plain"))
    with open_dense(parent) as expected:
        shutil.copy(parent / "config.json", folder)
        checkpoint = open_dense(f"nemo://{folder}")
        assert checkpoint.architecture == expected.architecture
        assert torch.equal(checkpoint.read("lm_head.weight"), expected.read("lm_head.weight"))


FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen2": write_qwen2,
    "qwen3": write_qwen3,
    "biased": partial(write_llama, attention_bias=True, mlp_bias=True),
    "tied": partial(write_llama, tied=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_is_read(saved: Path, tmp_path: Path, family: str) -> None:
    parent = FAMILIES[family](tmp_path / "dense", layers=2, vocab_size=259)
    run_ranks(save, 2, str(parent), str(tmp_path / "saved/weights"), False, {"tp": 2}, "")
    if family == "qwen3":
        shutil.copytree(saved / "qwen3/context", tmp_path / "saved/context")
    else:
        shutil.copy(parent / "config.json", tmp_path / "saved")
    with open_dense(tmp_path / "saved") as checkpoint, open_dense(parent) as expected:
        arch = expected.architecture
        assert replace(checkpoint.architecture, max_positions=arch.max_positions) == arch
        assert set(checkpoint.names()) == set(expected.names())
        for name in expected.names():
            assert torch.equal(checkpoint.read(name), expected.read(name)), name


def test_names_and_bounds_are_checked(saved: Path) -> None:
    with open_dense(saved / "one") as checkpoint:
        with pytest.raises(CheckpointError, match=r"q_pro\.weight' does not exist\. Did you mean .*q_proj\.weight'"):
            checkpoint.read("model.layers.0.self_attn.q_pro.weight")
        with pytest.raises(CheckpointError, match=r"slice .* of .*q_proj\.weight reaches beyond its shape \[64, 64\]"):
            # In the fused matrix, the rows of the keys follow the rows of the queries.
            checkpoint.read("model.layers.0.self_attn.q_proj.weight", [(0, 65), (0, 64)])


def test_without_a_tokenizer_the_padding_stays(nemo: Path) -> None:
    (tokenizer,) = (nemo / "context").rglob("tokenizer.json")
    tokenizer.unlink()
    assert open_dense(nemo).architecture.vocab_size == 272


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_moe_experts", 8, "model.yaml describes a model with 8 experts"),
        ("normalization", "LayerNorm", "model.yaml: normalization is LayerNorm; expected "),
        ("_target_", "nemo.collections.llm.gpt.model.mamba.Mamba", "model.yaml: _target_ is mamba"),
        ("activation_func", {"_target_": "a.b.relu"}, "model.yaml: activation_func is relu; expected "),
        ("ffn_hidden_size", 100, "linear_fc1.weight is [192, 64]; expected "),
        ("vocab_size", 300, "word_embeddings.weight is [272, 64]; expected "),
        ("share_embeddings_and_output_weights", True, "/nemo has the tensor module.output_layer.weight, which "),
    ],
)
def test_a_context_that_does_not_fit_is_refused(nemo: Path, name: str, value: Any, said: str) -> None:
    path = nemo / "context/model.yaml"
    model = yaml.safe_load(path.read_text())
    model["config"][name] = value
    path.write_text(yaml.safe_dump(model))
    with pytest.raises(CheckpointError) as caught:
        open_dense(nemo)
    assert said in str(caught.value)


def test_what_is_no_context_is_refused(nemo: Path) -> None:
    for content in ("", "[]", "config: 3", "a: [", "\x00"):
        (nemo / "context/model.yaml").write_text(content)
        with pytest.raises(CheckpointError, match=r"model\.yaml (cannot be read|does not describe) .*config\.json"):
            open_dense(nemo)
    (nemo / "context/model.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"does not describe its model: no context/model\.yaml .* or config\.json"
    ):
        open_dense(nemo)


def test_a_context_that_names_code_is_refused_and_not_run(nemo: Path) -> None:
    trace = nemo / "trace"
    text = f"config: !!python/object/apply:os.system ['touch {trace}']"
    (nemo / "context/model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.yaml cannot be read \(is not valid YAML: "):
        open_dense(nemo)
    assert not trace.exists()
    yaml.unsafe_load(text)  # an unsafe loader runs the code
    assert trace.exists()


def test_an_moe_and_integers_are_no_dense_parent(tmp_path: Path, parent: Path) -> None:
    import torch.distributed.checkpoint as dcp

    config = json.loads((parent / "config.json").read_text()) | {"num_hidden_layers": 1}
    embedding = {"embedding.word_embeddings.weight": torch.zeros(259, 64)}
    cases = {
        "router": (
            embedding | {"decoder.layers.mlp.router.weight": torch.zeros(1, 4, 64)},
            r"router has the tensor decoder\..*router\.weight, .*Give the dense parent",
        ),
        "other": (
            embedding | {"decoder.layers.mlp.adapter.weight": torch.zeros(1, 4, 64)},
            r"other has the tensor decoder\..*adapter",
        ),
        "int8": ({name: tensor.to(torch.int8) for name, tensor in embedding.items()}, r"is torch\.int8; expected "),
        "nothing": ({"weight": torch.zeros(3)}, "has no embedding.*Give a GPT checkpoint"),
    }
    for name, (tensors, words) in cases.items():
        dcp.save(tensors, checkpoint_id=tmp_path / name, no_dist=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=words):
            open_dense(tmp_path / name)
