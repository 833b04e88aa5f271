"""The table of fields covers every configuration field of Megatron-Core 0.19 and of Bridge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nemo_upcycle.models import config_fields
from nemo_upcycle.models.config_fields import meanings
from tests.bridge.runs import SPEC, refusal


def test_every_field_is_in_the_table() -> None:
    from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    kinds = (MLATransformerConfig, GPTModelProvider, GPTModelConfig, HybridModelProvider, HybridModelConfig)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert not names - meanings().keys()


@pytest.mark.parametrize("style", ["provider", "builder"])
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mtp_num_layers", 1, "no dense checkpoint has multi-token prediction"),
        ("moe_single_grouped_weight", True, "one parameter"),
        ("moe_router_force_biased", 3.0, "for benchmarks"),
        ("attention_output_gate", True, "expected False, as in the parent"),
        ("qk_clip", True, "does not know its effect on the model"),
        ("moe_mlp_glu_interleave_size", 32, "needs model.config.moe_grouped_gemm"),
    ],
)
def test_a_run_refuses_a_field_before_it_starts(
    dense: Path, tmp_path: Path, style: str, field: str, value: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: meaning for name, meaning in meanings().items() if name != "qk_clip"}
    monkeypatch.setattr(config_fields, "meanings", lambda: known)
    changes = {"model.moe_grouped_gemm": False, f"model.{field}": value}
    said = refusal(dense, tmp_path / "run", SPEC, changes, style=style)
    assert f"model.config.{field} " in said
    assert words in said


def test_bridge_does_not_save_interleaved_models_as_hugging_face(dense: Path, tmp_path: Path) -> None:
    changes = {"model.moe_mlp_glu_interleave_size": 32, "model.moe_grouped_gemm": True}
    said = refusal(dense, tmp_path / "run", SPEC, changes | {"checkpoint.also_save_hf_checkpoint": True})
    assert "checkpoint.also_save_hf_checkpoint" in said
