"""The check of step 0 keeps one layer in memory at a time, and computes the same bits as a check of whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.cpu.one_rank import one_rank
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.online.upcycle import load_dense_into, upcycle_into
from nemo_upcycle.recipes import smollm2_135m_e8t2
from nemo_upcycle.sources.resolve import open_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import equivalence, paged_models
from nemo_upcycle.trainers.equivalence import check_step0, megatron_logits
from nemo_upcycle.trainers.nemo.recipes import model_config
from nemo_upcycle.utils.files import MODEL_MARKER, read_json
from tests.functional.tiny import SIZES
from tests.models import hugging_face_logits, sample_tokens, write_llama


EXACT = UpcycleSpec(num_experts=4, top_k=2)


def _config(spec: UpcycleSpec | None, tied: bool) -> Any:
    recipe = smollm2_135m_e8t2.pretrain_recipe()
    for name, value in (SIZES | {"num_layers": 3, "share_embeddings_and_output_weights": tied}).items():
        setattr(recipe.model.config, name, value)
    recipe.model.config.num_moe_experts = spec.num_experts if spec else None
    return model_config(recipe)


def _whole(folder: Path, spec: UpcycleSpec | None, tied: bool, step0: Path) -> list[torch.Tensor]:
    """Return a whole model's logits in single and double precision, and its layers' outputs in double precision."""
    with one_rank(), open_dense(folder) as dense:
        config = paged_models._on_one_rank(_config(spec, tied), 259)
        config.init_model_with_meta_device = False
        model = config.configure_model(tokenizer=None).eval()
        if spec:
            upcycle_into([model], dense, spec)
            export_weights(LiveWeights(model), dense.architecture.upcycled(spec), folder, step0, dtype=torch.float32)
        else:
            load_dense_into([model], dense)
        single = megatron_logits(model, sample_tokens(259))
        with equivalence._layer_outputs(model.double()) as layers:
            return [single, megatron_logits(model, sample_tokens(259)), *layers]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_paged_models_compute_what_whole_ones_do(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_llama(tmp_path / "dense", vocab_size=259, tied=tied, layers=3)
    runs: list[Any] = []
    run = equivalence._run
    monkeypatch.setattr(equivalence, "_run", lambda *args: runs.append(run(*args)) or runs[-1])
    receipt = check_step0(
        _config(EXACT, tied), _config(None, tied), folder, EXACT, sample_tokens(259), tmp_path / "hf"
    )
    for found, spec in zip(runs, (None, EXACT), strict=True):
        wanted = _whole(folder, spec, tied, tmp_path / "whole")
        for one, other in zip([found.single_BSV, found.double_BSV, *found.layers], wanted, strict=True):
            assert torch.equal(one, other)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert receipt.bytes_read == receipt.bytes_needed
    assert receipt.total_params == read_architecture(folder).upcycled(EXACT).total_params
    assert receipt.equivalence["within_tolerance"]
    parent_BSV = hugging_face_logits(folder, sample_tokens(259))
    assert receipt.equivalence["max_abs_logit_diff"] == float((runs[1].single_BSV - parent_BSV).abs().max())


def _layers_and_ends(model: torch.nn.Module) -> set[str]:
    """Return the numbers of the layers and the names of the other parts whose weights are in memory."""
    names = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    return {name.removeprefix("decoder.layers.").partition(".")[0] for name in names}


def test_a_tied_embedding_is_given_back(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "dense", vocab_size=259, layers=3, tied=True)
    with one_rank(), open_dense(folder) as dense:
        paged, _ = paged_models.paged_megatron(_config(EXACT, True), dense, EXACT)
        equivalence._run(paged, dense, sample_tokens(259))
        assert all(one.is_meta for one in paged.model.parameters())


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "dense", vocab_size=259, layers=3)
    with one_rank(), open_dense(folder) as dense:
        paged, _ = paged_models.paged_megatron(_config(EXACT, False), dense, EXACT)
        there: list[set[str]] = []
        paged.progress = lambda part: there.append(_layers_and_ends(paged.model))
        megatron_logits(paged.model, sample_tokens(259), "cpu")
        assert len(there) == 6, there
        assert all(len(one) == 1 for one in there), there
        assert all(one.is_meta for one in paged.model.parameters())


@pytest.mark.parametrize(("method", "dtype"), [("copy", torch.bfloat16), ("noise", torch.float32)])
def test_step_0_has_the_parents_type_where_that_holds_it(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    folder, spec = write_llama(tmp_path / "dense", vocab_size=259, layers=3), replace(EXACT, method=method)
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    check_step0(_config(spec, False), _config(None, False), folder, spec, sample_tokens(259), tmp_path / "hf")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert {weight.dtype for weight in found.values()} == {dtype}
    rounded = read_json(tmp_path / "hf" / MODEL_MARKER)["rounded"]
    assert bool(rounded) == (dtype is torch.bfloat16)  # the random router is rounded
    if method == "copy":
        difference = hugging_face_logits(tmp_path / "hf", sample_tokens(259)) - hugging_face_logits(
            folder, sample_tokens(259)
        )
        assert float(difference.abs().max()) < 1e-4


def test_a_change_in_hugging_face_shows_only_in_its_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "dense", vocab_size=259, layers=3)

    def check() -> dict[str, Any]:
        config, dense_config = _config(EXACT, False), _config(None, False)
        return check_step0(config, dense_config, folder, EXACT, sample_tokens(259), None).equivalence

    before = check()
    paged_hugging_face = equivalence.paged_hugging_face

    def shifted(*args: Any) -> Any:
        paged = paged_hugging_face(*args)
        paged.model.register_forward_hook(lambda *call: setattr(call[-1], "logits", call[-1].logits + 0.5))
        return paged

    monkeypatch.setattr(equivalence, "paged_hugging_face", shifted)
    after = check()
    assert after["max_abs_logit_diff"] == pytest.approx(0.5, abs=1e-3)
    for name in ("max_abs_logit_diff_same_stack", "max_abs_logit_diff_same_stack_float32", "parent_float32_rounding"):
        assert after[name] == before[name] < 1e-4
    assert not after["within_tolerance"]
