"""Megatron's and NeMo's own checkpoints, of several layouts, read as the Hugging Face folders that they came from."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.cpu.one_rank import one_rank
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.sources.megatron_checkpoint import MegatronCheckpoint
from tests.distributed.ranks import run_ranks
from tests.models import build_chunks, write_llama, write_qwen3, write_tokenizer


LAYOUTS = {"one": {}, "tp2pp2": {"tp": 2, "pp": 2}}
ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _save(folder: str, output: str, layout: dict[str, int], prefix: str) -> None:
    from megatron.core import dist_checkpointing

    (chunk,) = build_chunks(Path(folder), num_experts=None, layout=layout)
    with open_dense(folder) as source:
        load_dense_into([chunk], source)
    Path(output).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(chunk.sharded_state_dict(prefix=prefix), output)


def _write_context(parent: str, output: str, **changes: Any) -> None:
    """Let NeMo write the context of a checkpoint, as its trainer does."""
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.lightning.io.pl import TrainerContext

    config = llm.Llama31Config8B(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        rotary_base=100000,
        apply_rope_fusion=False,
        **changes,
    )
    model = llm.LlamaModel(config, tokenizer=AutoTokenizer(parent))
    trainer = nl.Trainer(accelerator="cpu", devices=1)
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(Path(output), yaml_attrs=["model"])


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return write_tokenizer(write_llama(folder, vocab_size=259, rope_scaling=ROPE_SCALING, attention_bias=False))


@pytest.fixture(scope="module")
def saved(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one model: NeMo checkpoints of one rank and of four."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(_write_context, 1, str(parent), str(folder / "context"), process_group=False)
    for name, layout in LAYOUTS.items():
        ranks = layout.get("tp", 1) * layout.get("pp", 1)
        run_ranks(_save, ranks, str(parent), str(folder / name / "weights"), layout, "module.")
        shutil.copytree(folder / "context", folder / name / "context")
    return folder


@pytest.fixture
def nemo(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(saved / "tp2pp2", tmp_path / "nemo"))


def _write_qwen3_context(parent: str, output: str) -> None:
    from nemo import lightning as nl
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config8B, Qwen3Model
    from nemo.lightning.io.pl import TrainerContext

    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "kv_channels": 16}
    config = Qwen3Config8B(**sizes, num_query_groups=2, rotary_base=100000, layernorm_epsilon=1e-5, vocab_size=260)
    trainer = nl.Trainer(accelerator="cpu", devices=1)
    model = Qwen3Model(config, tokenizer=AutoTokenizer(parent))
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(Path(output), yaml_attrs=["model"])


def test_a_qwen3_trained_in_nemo_is_read_with_its_norms(tmp_path: Path) -> None:
    folder = write_tokenizer(write_qwen3(tmp_path / "dense", layers=2, vocab_size=260))
    run_ranks(_write_qwen3_context, 1, str(folder), str(tmp_path / "nemo/context"), process_group=False)
    run_ranks(_save, 2, str(folder), str(tmp_path / "nemo/weights"), {"tp": 2}, "module.")
    with open_dense(tmp_path / "nemo") as checkpoint, open_dense(folder) as expected:
        assert replace(checkpoint.architecture, max_positions=32768) == expected.architecture
        assert "model.layers.1.self_attn.q_norm.weight" in set(checkpoint.names()) == set(expected.names())
        for name in expected.names():
            assert torch.equal(checkpoint.read(name), expected.read(name)), name


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


def test_upcycling_from_it_gives_the_same_bits(saved: Path, parent: Path) -> None:
    spec = UpcycleSpec(num_experts=4, top_k=2, granularity=2, method="drop")
    results = []
    with one_rank():
        for folder in (saved / "tp2pp2", parent):
            chunks = build_chunks(parent, num_experts=4, moe_ffn_hidden_size=48)
            with open_dense(folder) as dense:
                receipt = upcycle_into(chunks, dense, spec, hashes=True)
            results.append((receipt.bytes_read, {record.name: record.sha256 for record in receipt.parameters}))
    assert results[0] == results[1]


def _start(parent: str, path: str, branches: list[str]) -> tuple[list[str], list[str]]:
    """Fill a model as a training run does, and return what the receipt says of files and exactness."""
    from nemo_upcycle.online.upcycle import fill_chunks
    from nemo_upcycle.trainers.nemo.upcycling import UpcycleConfig

    spec = UpcycleSpec(num_experts=4, top_k=2)
    restore = UpcycleConfig(path=path, spec=spec, branches=branches, non_expert_weights="mean")
    paths = [restore.path, *restore.branches]
    receipt = fill_chunks(build_chunks(Path(parent), num_experts=4), paths, restore.spec, restore.non_expert_weights)
    return sorted(receipt.source_files), receipt.inexact_because


def test_a_run_can_start_from_one_and_from_several(saved: Path, parent: Path) -> None:
    one, four = saved / "one", saved / "tp2pp2"
    ((files, reasons),) = run_ranks(_start, 1, str(parent), f"nemo://{one}", [])
    assert ".metadata" in files
    assert not reasons
    ((files, reasons),) = run_ranks(_start, 1, str(parent), str(one), [f"nemo://{four}"])
    assert {f"{one}/.metadata", f"{four}/.metadata"} <= set(files)
    assert len(reasons) == 1


def test_plain_megatron_needs_a_config_json(saved: Path, parent: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "one/weights", tmp_path / "plain"))
    with pytest.raises(CheckpointError, match=r"got neither context/model\.yaml .* nor config\.json.*Fix: put"):
        open_dense(folder)
    with open_dense(parent) as expected:
        given = MegatronCheckpoint(folder, parent / "config.json")
        shutil.copy(parent / "config.json", folder)
        for checkpoint in (given, open_dense(f"nemo://{folder}")):
            assert checkpoint.architecture == expected.architecture
            assert torch.equal(checkpoint.read("lm_head.weight"), expected.read("lm_head.weight"))


@pytest.mark.parametrize("family", ["qwen2", "biased", "tied"])
def test_families(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"tied": True} if family == "tied" else {}
    parent = write_llama(tmp_path / "dense", layers=2, **changes)
    if family != "tied":
        from safetensors.torch import load_file, save_file

        config = json.loads((parent / "config.json").read_text())
        tensors = load_file(parent / "model.safetensors")
        kinds = {"qwen2": ("q", "k", "v"), "biased": ("q", "k", "v", "o")}[family]
        for layer in range(2):
            for kind in kinds:
                name = f"model.layers.{layer}.self_attn.{kind}_proj."
                tensors[name + "bias"] = torch.randn(tensors[name + "weight"].shape[0])
        if family == "qwen2":
            config["architectures"] = ["Qwen2ForCausalLM"]
        else:
            config |= {"attention_bias": True, "mlp_bias": True}
            for layer in range(2):
                for kind, size in (("gate", 96), ("up", 96), ("down", 64)):
                    tensors[f"model.layers.{layer}.mlp.{kind}_proj.bias"] = torch.randn(size)
        save_file(tensors, parent / "model.safetensors")
        (parent / "config.json").write_text(json.dumps(config))
    run_ranks(_save, 2, str(parent), str(tmp_path / "saved"), {"tp": 2}, "")
    shutil.copy(parent / "config.json", tmp_path / "saved")
    with open_dense(tmp_path / "saved") as checkpoint, open_dense(parent) as expected:
        assert set(checkpoint.names()) == set(expected.names())
        for name in expected.names():
            assert torch.equal(checkpoint.read(name), expected.read(name)), name


def test_names_and_bounds_are_checked(saved: Path) -> None:
    with open_dense(saved / "one") as checkpoint:
        with pytest.raises(CheckpointError, match=r"q_pro\.weight' does not exist\. Did you mean .*q_proj\.weight'"):
            checkpoint.read("model.layers.0.self_attn.q_pro.weight")
        with pytest.raises(CheckpointError, match=r"q_proj\.weight: slice .* reaches beyond its shape \[64, 64\]"):
            checkpoint.read("model.layers.0.self_attn.q_proj.weight", [(0, 65), (0, 64)])  # its keys come next


def test_without_a_tokenizer_the_padding_stays(nemo: Path) -> None:
    (tokenizer,) = (nemo / "context").rglob("tokenizer.json")
    tokenizer.unlink()
    assert open_dense(nemo).architecture.vocab_size == 272


def _set(**changes: Any) -> Any:
    return lambda config: config.update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set(num_moe_experts=8), r"num_moe_experts: got 8, expected None\. Fix: give a dense parent"),
        (_set(normalization="LayerNorm"), "normalization: got LayerNorm, expected RMSNorm"),
        (_set(_target_="nemo.collections.llm.gpt.model.mamba.Mamba"), "_target_: got mamba, expected llama or"),
        (_set(activation_func={"_target_": "a.b.relu"}), "activation_func: got relu, expected silu or"),
        (_set(hidden_size="many"), r"model\.yaml: got settings of other types"),
        (
            _set(ffn_hidden_size=100),
            r"linear_fc1\.weight: got \[192, 64\], expected \[200, 64\], as the configuration",
        ),
        (_set(vocab_size=300), r"word_embeddings\.weight: got \[272, 64\], expected \[300, 64\]"),
        (_set(share_embeddings_and_output_weights=True), r"tensor: got module\.output_layer\.weight"),
        (_set(num_attention_heads=3), r"linear_proj\.weight: got"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(nemo: Path, change: Any, words: str) -> None:
    path = nemo / "context/model.yaml"
    model = yaml.safe_load(path.read_text())
    change(model["config"])
    path.write_text(yaml.safe_dump(model))
    with pytest.raises(CheckpointError, match=words):
        open_dense(nemo)


@pytest.mark.parametrize("content", ["", "[]", "config: 3", "a: [", "\x00"])
def test_what_is_no_context_is_refused(nemo: Path, content: str) -> None:
    (nemo / "context/model.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.yaml: got an unreadable description.*config\.json"):
        open_dense(nemo)
    (nemo / "context/model.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"got neither context/model\.yaml .* nor config\.json"):
        open_dense(nemo)


def test_a_context_that_names_code_is_refused_and_not_run(nemo: Path) -> None:
    trace = nemo / "trace"
    text = f"config: !!python/object/apply:os.system ['touch {trace}']"
    (nemo / "context/model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="unreadable description"):
        open_dense(nemo)
    assert not trace.exists()
    yaml.unsafe_load(text)  # a loader that is not safe does run it
    assert trace.exists()


def test_an_moe_and_integers_are_no_dense_parent(tmp_path: Path, parent: Path) -> None:
    import torch.distributed.checkpoint as dcp

    config = json.loads((parent / "config.json").read_text()) | {"num_hidden_layers": 1}
    embedding = {"embedding.word_embeddings.weight": torch.zeros(259, 64)}
    cases = {
        "router": (embedding | {"decoder.layers.mlp.router.weight": torch.zeros(1, 4, 64)}, "give the dense parent"),
        "other": (embedding | {"decoder.layers.mlp.adapter.weight": torch.zeros(1, 4, 64)}, "got decoder.*adapter"),
        "int8": ({name: tensor.to(torch.int8) for name, tensor in embedding.items()}, "got torch.int8"),
        "nothing": ({"weight": torch.zeros(3)}, "got no embedding.*expected a GPT checkpoint"),
    }
    for name, (tensors, words) in cases.items():
        dcp.save(tensors, checkpoint_id=tmp_path / name, no_dist=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=words):
            open_dense(tmp_path / name)
