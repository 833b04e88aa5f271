"""`prove` runs a folder in the installed transformers. These tests run in transformers 4 and in transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert import proof as module
from nemo_upcycle.convert.proof import Proof, prove, record, said
from nemo_upcycle.models.hf_model import load_as_written
from nemo_upcycle.utils.files import MODEL_MARKER, read_json
from tests.compatibility import check, written
from tests.folders import SPEC, change_config, change_weights, converted
from tests.loading.rows import COPIES, FINE
from tests.loading.test_classes import EXACT
from tests.loading.test_wrapped import AROUND, SEEN
from tests.models import write_llama
from tests.parents import write_olmoe, write_wrapped
from tests.tiers import quick


pytestmark = pytest.mark.slow
FOUR = transformers.__version__.startswith("4.")
LLAMA = partial(write_llama, layers=4)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A random Llama with four layers."""
    return LLAMA(tmp_path / "dense")


def _proved(parent: Path, output: Path, spec: UpcycleSpec = SPEC, **options: Any) -> Proof:
    converted(parent, output, spec)
    return prove(output, parent, **options)


def test_an_equal_model_is_called_equal_on_its_card(parent: Path, tmp_path: Path) -> None:
    found = _proved(parent, tmp_path / "moe")
    assert (found.outcome, found.layers, found.num_layers, found.picture) == ("equal", 4, 4, False)
    assert found.difference is not None
    assert 0 < found.difference < 2e-6
    record(tmp_path / "moe", found)
    marker, card = read_json(tmp_path / "moe" / MODEL_MARKER), (tmp_path / "moe/README.md").read_text()
    assert marker["proof"]["files_sha256"] == found.files_sha256
    assert f"\n## Checked\n\nComputes the parent's function: in transformers {transformers.__version__}, on 64" in card
    record(tmp_path / "moe", found)
    assert (tmp_path / "moe/README.md").read_text() == card


def test_a_changed_expert_is_called_different(parent: Path, tmp_path: Path) -> None:
    converted(parent, tmp_path / "moe")
    name = "model.layers.3.block_sparse_moe.experts.1.w2.weight"
    change_weights(tmp_path / "moe", {name: torch.zeros(64, 96)})
    assert prove(tmp_path / "moe", parent).outcome == "different"
    assert prove(tmp_path / "moe", parent, sample_params=1).outcome == "equal"  # the first layer is as it was


@pytest.mark.parametrize(("where", "layers"), [("all", 1), ("2", 3)])
def test_a_large_model_runs_to_its_first_experts(parent: Path, tmp_path: Path, where: str, layers: int) -> None:
    found = _proved(parent, tmp_path / "moe", replace(SPEC, moe_layers=where), sample_params=1)
    assert (found.outcome, found.layers) == ("equal", layers)
    assert f"random tokens, through {layers} of 4 layers, its logits differ by" in said(found)


def test_a_model_larger_than_memory_is_not_run(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1000)
    found = _proved(parent, tmp_path / "moe")
    assert (found.outcome, found.difference) == ("not run", None)
    assert "GiB of memory are needed, and 0.0 GiB are free" in said(found)


@pytest.mark.parametrize("changes", [{"model_type": "not_yet"}, {"architectures": ["NotYetForCausalLM"]}])
def test_an_unknown_class_is_not_run(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    converted(parent, tmp_path / "moe")
    monkeypatch.setattr(module, "SafetensorsFolder", partial(_as_it_was, change_config, changes))
    found = prove(tmp_path / "moe", parent)
    assert (found.outcome, found.reason.startswith("it does not know ")) == ("not run", True)


def _as_it_was(change: Any, changes: dict[str, Any], folder: Path) -> Any:
    """Open a folder, then change its files: the package reads the original, transformers reads the change."""
    from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder

    opened = SafetensorsFolder(folder)
    change(folder, **changes)
    return opened


def test_an_unequal_spec_is_told_as_expected(parent: Path, tmp_path: Path) -> None:
    done = converted(parent, tmp_path / "moe", replace(SPEC, method="noise"))
    found = prove(tmp_path / "moe", parent)
    assert (done.exact, found.outcome) == (False, "different")
    assert f". A difference is expected: {done.inexact_because[0]}" in said(found, "; ".join(done.inexact_because))


def test_a_model_without_a_parent_only_runs(parent: Path, tmp_path: Path) -> None:
    converted(parent, tmp_path / "moe")
    found = prove(tmp_path / "moe", None)
    assert (found.outcome, found.difference) == ("ran", None)
    assert said(found) == f"Runs in transformers {transformers.__version__}, on 64 random tokens"


def test_nan_weights_fail(parent: Path, tmp_path: Path) -> None:
    converted(parent, tmp_path / "moe")
    change_weights(tmp_path / "moe", {"model.norm.weight": torch.full((64,), float("nan"))})
    assert said(prove(tmp_path / "moe", parent)).endswith("its logits are NaN or infinite")


def test_a_missing_tensor_fails(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted(parent, tmp_path / "moe")
    change = {"changes": {"model.layers.1.block_sparse_moe.gate.weight": None}}
    monkeypatch.setattr(module, "SafetensorsFolder", partial(_as_it_was, change_weights, change))
    assert "tensors of the folder and the class do not agree" in said(prove(tmp_path / "moe", parent))


def test_experts_of_an_uneven_width_run_as_the_card_says(tmp_path: Path) -> None:
    """Experts with 172 numbers per row in 16 bits: transformers 5 refuses to multiply them in one product."""
    parent = write_llama(tmp_path / "dense", layers=1, intermediate_size=344)
    weights = load_file(parent / "model.safetensors")
    change_weights(parent, {name: tensor.bfloat16() for name, tensor in weights.items()})
    done = converted(parent, tmp_path / "moe", UpcycleSpec(**FINE))
    found = prove(tmp_path / "moe", parent)
    assert (found.outcome, found.expert_kernel) == ("equal", "loop" if FOUR else "eager")
    assert any("experts_implementation" in caveat for caveat in done.caveats)
    if not FOUR:
        model = load_as_written(tmp_path / "moe", dtype="auto")
        with pytest.raises(RuntimeError, match="multiple of 16"):
            model(torch.arange(8)[None])


@pytest.mark.parametrize("kind", SEEN)
def test_a_model_that_sees_gets_a_picture(tmp_path: Path, kind: str) -> None:
    parent = write_wrapped(tmp_path / "dense", kind, tied=kind in ("SmolVLM", "Gemma4"))
    found = _proved(parent, tmp_path / "moe")
    assert (found.outcome, found.picture) == ("equal", True)
    assert found.hf_class == f"{AROUND.get(kind, kind)}ForConditionalGeneration"
    assert _proved(parent, tmp_path / "alone", sample_params=1).layers == 1


@pytest.mark.skipif(not FOUR, reason="transformers 5 runs such a model")
def test_a_class_that_this_release_cannot_run_fails(tmp_path: Path) -> None:
    parent = write_wrapped(tmp_path / "dense", "InternVL")
    found = _proved(parent, tmp_path / "moe")
    assert found.outcome == "failed"
    assert "Qwen2MoeModel.forward() got an unexpected keyword argument 'image_sizes'" in said(found)


MINICPM = ("MiniCPMV4_7",) if hasattr(transformers, "MiniCPMV4_7Config") else ()
#: Models of every class that transformers can hold: rows of an exact model, and models that see.
TABLE: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    **{name: (row.write, row.spec) for name, row in EXACT.items()},
    **{f"{kind} that sees": (partial(write_wrapped, kind=kind), COPIES) for kind in (*SEEN, "InternVL", *MINICPM)},
    "OLMoE": (partial(write_olmoe, norm_topk_prob=True), {"num_experts": 8, "top_k": 4, "router_std": 0.0}),
    "an uneven width": (partial(write_llama, layers=1, intermediate_size=344), FINE),
}
RESULTS = {"equal": "same", "different": "other", "failed": "refused", "not run": "refused"}


@pytest.mark.parametrize("name", quick(TABLE, "Seed-OSS", "InternVL that sees"))
def test_this_release_does_what_the_table_says(tmp_path: Path, name: str) -> None:
    write, spec = TABLE[name]
    parent = write(tmp_path / "dense")
    dtype = torch.bfloat16 if name == "an uneven width" else torch.float32
    if dtype is torch.bfloat16:
        tensors = load_file(parent / "model.safetensors")
        change_weights(parent, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    found = _proved(parent, tmp_path / "moe", UpcycleSpec(**spec))
    runtime = f"transformers {4 if FOUR else 5}"
    check(runtime, written(tmp_path / "moe", dtype.itemsize), RESULTS[found.outcome])
