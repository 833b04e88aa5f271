"""Settings of the model that no shape shows: refused where they change the function, named where they round it."""

from __future__ import annotations

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.connector import load_dense_into
from nemo_upcycle.errors import CheckpointError
from tests.models import MemorySource, build_chunks, small_architecture


pytestmark = pytest.mark.usefixtures("megatron")
SPEC = UpcycleSpec(num_experts=4, top_k=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_interleaved": True}, "rotary_interleaved: got True, expected False"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset: got 1.0, expected 0.0"),
        ({"activation_func_clamp_value": 0.5}, "activation_func_clamp_value: got 0.5, expected None"),
        ({"softmax_scale": 1.0}, "softmax_scale: got 1.0, expected None or 0.25"),
        ({"no_rope_freq": 2}, "no_rope_freq: got"),
    ],
)
def test_a_setting_that_changes_the_function_is_refused(changes: dict, words: str) -> None:
    chunks = build_chunks(small_architecture(), num_experts=4, **changes)
    with pytest.raises(CheckpointError, match=words):
        upcycle_into(chunks, MemorySource(small_architecture()), SPEC)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ({"seq_len_interpolation_factor": 4.0}, {}, "seq_len_interpolation_factor: got 4.0, expected None"),
        ({"rotary_percent": 0.5}, {}, "rotary_percent: got 0.5, expected 1.0"),
        ({"position_embedding_type": "none"}, {}, "position_embedding_type: got none, expected rope"),
        (
            {"position_embedding_type": "learned_absolute"},
            {},
            "position_embedding_type: got learned_absolute, expected rope",
        ),
        (
            {"position_embedding_type": "mrope"},
            {"mrope_section": [4, 2, 2]},
            "position_embedding_type: got mrope, expected rope",
        ),
    ],
)
def test_position_embeddings_of_another_kind_are_refused(model: dict, changes: dict, words: str) -> None:
    arch = small_architecture()
    chunks = build_chunks(arch, num_experts=4, model=model, **changes)
    before = [parameter.clone() for parameter in chunks[0].parameters()]
    with pytest.raises(CheckpointError, match=rf"model\.config\.{words}.*Fix: "):
        upcycle_into(chunks, MemorySource(arch), SPEC)
    for parameter, was in zip(chunks[0].parameters(), before, strict=True):
        assert torch.equal(parameter, was)
    with pytest.raises(CheckpointError, match=words):
        load_dense_into(build_chunks(arch, num_experts=None, model=model, **changes), MemorySource(arch))


def test_an_interpolation_of_one_changes_nothing() -> None:
    chunks = build_chunks(small_architecture(), num_experts=4, model={"seq_len_interpolation_factor": 1.0})
    assert upcycle_into(chunks, MemorySource(small_architecture()), SPEC).exact


def test_the_usual_softmax_scale_may_be_spelled_out() -> None:
    chunks = build_chunks(small_architecture(), num_experts=4, softmax_scale=0.25)
    assert upcycle_into(chunks, MemorySource(small_architecture()), SPEC).exact


def test_weights_that_the_models_type_rounds_are_told() -> None:
    chunks = build_chunks(small_architecture(), num_experts=6, top_k=3, params_dtype=torch.bfloat16)
    source = MemorySource(small_architecture())
    receipt = upcycle_into(chunks, source, UpcycleSpec(num_experts=6, top_k=3))
    (reason,) = receipt.inexact_because
    assert reason.startswith("float32 weights are rounded to bfloat16 (")


def test_gemmas_scaled_embedding_is_asked_for() -> None:
    gemma = {"hf_class": "GemmaForCausalLM", "activation": "gelu_tanh"}
    chunks = build_chunks(small_architecture(), num_experts=4, activation_func=torch.nn.GELU("tanh"))
    source = MemorySource(small_architecture(**gemma))
    (reason,) = upcycle_into(chunks, source, SPEC).inexact_because
    assert reason.startswith("the model does not multiply its embedding by sqrt(hidden_size)")
    from nemo.collections.common.parts.utils import extend_instance
    from nemo.collections.llm.gpt.model.gemma2 import EmbeddingScalingMixin

    # What NeMo's GemmaModel does.
    extend_instance(chunks[0].embedding, EmbeddingScalingMixin)
    assert upcycle_into(chunks, source, SPEC).exact
