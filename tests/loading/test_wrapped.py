"""A text model among other parts is read where it lies: its logits are the whole model's on a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import SpecError
from nemo_upcycle.evaluation import backends
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.hf_model import errors_only
from nemo_upcycle.sources.base import left_out
from nemo_upcycle.sources.checks import check_source
from nemo_upcycle.verify.verification import verify
from tests.loading.cases import logits
from tests.models import sample_tokens, write_tokenizer
from tests.parents import MINISTRAL3, write_wrapped
from tests.tiers import quick


pytestmark = pytest.mark.slow
EXACT = 2e-6


class Row(NamedTuple):
    """A class around a text model, and the class of what is made of that.

    Args:
        kind: a key of `WRAPPED`.
        hf_class: of the MoE; "": none.
        text: of the text model, if not that of `WRAPPED`.
        changes: settings of the text model, and `tied`.
    """

    kind: str
    hf_class: str
    text: str = ""
    changes: Mapping[str, Any] = MappingProxyType({})


ROWS = [
    Row("Mistral3", "MixtralForCausalLM"),
    Row("Mistral3", "MixtralForCausalLM", "Ministral3", MINISTRAL3),
    Row("Llava", "MixtralForCausalLM", changes={"tied": True}),
    Row("Llava", "MixtralForCausalLM", "Mistral", {"window": 5}),
    Row("InternVL", "Qwen2MoeForCausalLM"),
    Row("InternVL", "Qwen3MoeForCausalLM", "Qwen3", {"tied": True}),
    Row("Gemma3", "", changes={"tied": True, "layers": 6}),
    Row("Qwen2_5_VL", "Qwen2MoeForCausalLM"),
    Row("Qwen3VL", "Qwen3MoeForCausalLM", changes={"tied": True}),
    Row("Exaone4_5_", "", changes={"layers": 4}),
    Row("Idefics3", "MixtralForCausalLM"),
    Row("SmolVLM", "MixtralForCausalLM", changes={"tied": True}),
]
HERE = [row for row in ROWS if all(hasattr(transformers, f"{name}Config") for name in (row.kind, row.text or "Llama"))]


@torch.no_grad()
def _whole_logits(folder: Path, kind: str, tokens_BS: torch.Tensor) -> torch.Tensor:
    with errors_only():
        found = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(folder, dtype=torch.float32)
    return found.eval()(input_ids=tokens_BS, attention_mask=torch.ones_like(tokens_BS)).logits


def _spell_anew(folder: Path) -> None:
    """Rename the text model's tensors as the other releases of transformers have them."""
    other = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next((old for old in other if name.startswith(old)), "")
        renamed[other.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "row", quick(HERE, HERE[0], HERE[-2]), ids=lambda row: f"{row.kind}{row.text and '-' + row.text}"
)
def test_the_text_part_of_a_model_that_sees_is_a_parent(tmp_path: Path, row: Row) -> None:
    folder, tokens = tmp_path / "dense", sample_tokens(250)
    write_tokenizer(write_wrapped(folder, row.kind, text=row.text, **{"vocab_size": 259} | row.changes))
    wanted = _whole_logits(folder, row.kind, tokens)
    weights = load_file(folder / "model.safetensors")
    arch, spec = read_architecture(folder), UpcycleSpec(num_experts=4, top_k=2)
    for spelled in ("as written", "anew"):
        if spelled == "anew":
            _spell_anew(folder)
        with open_dense(folder) as dense:
            check_source(dense)
            beside = left_out(dense)
            numbers = sum(dense.read(name).numel() for name in dense.names())
            assert dense.bytes_read == 4 * numbers
        assert arch.total_params == numbers
        assert sum(part["tensors"] for part in beside.values()) + len(list(dense.names())) == len(weights)
        assert sum(part["bytes"] for part in beside.values()) == 4 * (
            sum(map(torch.numel, weights.values())) - numbers
        )
        assert float((logits(folder, tokens) - wanted).norm() / wanted.norm()) <= EXACT
    assert backends.load_model(folder)[0].num_parameters() == numbers
    if not row.hf_class:
        with open_dense(folder) as dense, pytest.raises(SpecError, match="Hugging Face class for this MoE"):
            convert(dense, tmp_path / "moe", spec, progress=False)
        return
    with open_dense(folder) as dense:
        done = convert(dense, tmp_path / "moe", spec, progress=False)
    assert (done.hf_class, done.exact, done.left_out) == (row.hf_class, True, beside)
    assert float((logits(tmp_path / "moe", tokens) - wanted).norm() / wanted.norm()) <= EXACT
    (tmp_path / "text").write_text("A picture says more than a thousand words.")
    assert verify(folder, tmp_path / "moe", tmp_path / "text").equal
