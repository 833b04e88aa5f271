"""For every parent, the converted folder and Megatron's filled layers compute the parent's function.

transformers' own classes give the logits of the parent and of the converted folder. Exporting Megatron's layers gives
the same bits as the conversion.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.growth import inexact_because
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import window_fields
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from nemo_upcycle.utils.files import read_json
from tests.folders import converted
from tests.loading.cases import logits
from tests.loading.rows import LONG, LONGROPE, PARENTS, WEEKLY, Parent
from tests.models import (
    build_chunks,
    moe_settings,
    require_same_weights,
    sample_tokens,
    scale_embedding,
    weights_of,
    write_llama,
    write_olmo2,
    write_phi3,
)
from tests.tiers import quick


pytestmark = pytest.mark.usefixtures("megatron")
EXACT = 2e-6


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", quick([*PARENTS, *WEEKLY], *PARENTS))
def test_what_is_made_of_a_parent_computes_what_it_does(tmp_path: Path, name: str) -> None:
    row = (PARENTS | WEEKLY)[name]
    folder, spec = row.write(tmp_path / "dense"), UpcycleSpec(**row.spec)
    arch, wanted = read_architecture(folder), logits(folder, sample_tokens(250))
    numbers = sum(weight.numel() for key, weight in weights_of(folder).items() if not key.endswith("correction_bias"))
    assert arch.total_params == numbers
    is_exact = row.dtype is torch.float32 and not inexact_because(arch, spec)
    if row.hf_class:
        done = converted(folder, tmp_path / "offline", spec, dtype=row.dtype)
        assert (read_architecture(tmp_path / "offline").hf_class, done.exact) == (row.hf_class, is_exact)
        assert verify(folder, tmp_path / "offline", logits=False).equal is is_exact
        if is_exact and hasattr(transformers, row.hf_class):
            assert _error(logits(tmp_path / "offline", sample_tokens(250)), wanted) <= EXACT
    else:
        with pytest.raises(SpecError, match="This MoE fits no Hugging Face class"):
            converted(folder, tmp_path / "offline", spec)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    _check_online(row, folder, wanted if is_exact else None, tmp_path)


def _check_online(row: Parent, folder: Path, wanted: torch.Tensor | None, output: Path) -> None:
    """Check logits and exported weights of two Megatron models: the parent itself, and the MoE made from it."""
    spec, arch, window = UpcycleSpec(**row.spec), read_architecture(folder), window_fields(read_architecture(folder))
    counts = {"num_experts": arch.num_experts} | ({"top_k": arch.top_k} if arch.num_experts else {})
    (model,) = build_chunks(folder, **moe_settings(arch, spec), **window, params_dtype=row.dtype)
    # One Megatron setting controls both the biases of the attention's output and the biases of the experts.
    if not row.online:
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match="bias"):
            upcycle_into([model], dense, spec)
        return
    (own,) = build_chunks(folder, **(moe_settings(arch, spec) if arch.num_experts else {}) | counts, **window)
    for made in (own, model) if arch.scaled_embedding else ():
        scale_embedding(made)
    with open_dense(folder) as dense:
        assert load_dense_into([own], dense).exact
        receipt = upcycle_into([model], dense, spec)
    assert receipt.exact is (wanted is not None)
    # Methods other than `copy` also read the weights to decide their changes.
    assert receipt.bytes_read == receipt.bytes_needed or spec.method != "copy"
    for made in (own, model) if wanted is not None else ():
        assert _error(megatron_logits(made.eval(), sample_tokens(250))[..., :250], wanted) <= EXACT
    export_weights(LiveWeights(own), arch, folder, output / "own", dtype=torch.float32)
    require_same_weights(folder, output / "own")
    if row.hf_class:
        export_weights(LiveWeights(model), arch.upcycled(spec), folder, output / "online", dtype=row.dtype)
        require_same_weights(output / "offline", output / "online")
        assert read_json(output / "online/config.json") == read_json(output / "offline/config.json")


def test_norms_in_other_places_are_no_place_for_a_parents(tmp_path: Path) -> None:
    olmo2, llama = write_olmo2(tmp_path / "olmo2"), write_llama(tmp_path / "llama", layers=2)
    for folder, other in ((olmo2, llama), (llama, olmo2)):
        (model,) = build_chunks(other, num_experts=None)
        before = [parameter.clone() for parameter in model.parameters()]
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match=r"qk_layernorm|without a source"):
            load_dense_into([model], dense)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    with pytest.raises(CheckpointError, match="Omit hybrid_layer_pattern"):
        megatron_fields(read_architecture(olmo2), hybrid=True)


def test_longrope_needs_its_factor_and_its_frequencies(tmp_path: Path) -> None:
    folder = write_phi3(tmp_path / "dense", **LONGROPE)
    plain, fused, other = (build_chunks(folder, num_experts=None)[0] for _ in range(3))
    plain.config.yarn_mscale = 0.0
    fused.config.apply_rope_fusion = True
    other.rotary_pos_emb.inv_freq = other.rotary_pos_emb.inv_freq * 2
    words = ("yarn_mscale is a factor of 1; expected", "apply_rope_fusion is True", "rotary_base and RoPE scaling")
    for model, text in zip((plain, fused, other), words, strict=True):
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match=text):
            load_dense_into([model], dense)


def test_a_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "dense", rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    (model,) = build_chunks(write_llama(tmp_path / "plain"), num_experts=None)
    with open_dense(folder) as dense, pytest.raises(CheckpointError, match="rope_scaling is dynamic; expected"):
        load_dense_into([model], dense)


def test_both_names_of_longrope_are_one(tmp_path: Path) -> None:
    named = {"rope_scaling": LONG | {"type": "su"}, "original_max_position_embeddings": 16}
    scaling = read_architecture(write_phi3(tmp_path / "dense", **named)).rope_scaling
    assert scaling == LONG | {"rope_type": "longrope", "original_max_position_embeddings": 16}
