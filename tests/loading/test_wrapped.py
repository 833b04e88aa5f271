"""Check that a text model inside a multimodal model is read in place: both compute the same logits for a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_upcycle import open_dense
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.errors import SpecError
from nemo_upcycle.evaluation import backends
from nemo_upcycle.models.families.gemma4 import EXPERTS
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.hf_model import errors_only
from nemo_upcycle.sources.base import left_out
from nemo_upcycle.sources.checks import check_source
from tests.folders import converted
from tests.loading.cases import logits
from tests.models import sample_tokens, write_tokenizer
from tests.parents import GRANITE, MINISTRAL3, write_wrapped
from tests.tiers import quick


pytestmark = pytest.mark.slow
EXACT = 2e-6


#: Each row has a key of `WRAPPED`, the class of the MoE ("" if no class can represent the MoE), the class of the text
#: model ("" for the class in `WRAPPED`), and the settings of the text model.
ROWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("Mistral3", "MixtralForCausalLM", "", {}),
    ("Mistral3", "MixtralForCausalLM", "Ministral3", MINISTRAL3),
    ("Llava", "MixtralForCausalLM", "", {"tied": True}),
    ("Llava", "MixtralForCausalLM", "Mistral", {"window": 5}),
    ("Llava", "GraniteMoeForCausalLM", "Granite", GRANITE | {"head_dim": None}),
    ("InternVL", "Qwen2MoeForCausalLM", "", {}),
    ("InternVL", "Qwen3MoeForCausalLM", "Qwen3", {"tied": True}),
    ("Gemma3", "", "", {"tied": True, "layers": 6}),
    ("Gemma4", EXPERTS, "", {"tied": True}),
    ("Gemma4Unified", EXPERTS, "", {"tied": True}),
    ("Qwen2_5_VL", "Qwen2MoeForCausalLM", "", {}),
    ("Qwen3VL", "Qwen3MoeForCausalLM", "", {"tied": True}),
    ("Qwen3_5", "Qwen3_5MoeForCausalLM", "", {}),
    ("MiniCPMV4_7", "Qwen3_5MoeForCausalLM", "", {}),
    ("MiniCPMOcr", "Qwen3_5MoeForCausalLM", "", {"tied": True}),
    ("HyperCLOVAXVisionV2", "GraniteMoeForCausalLM", "", {}),
    ("Exaone4_5_", "", "", {"layers": 4}),
    ("GraniteDocling", "GraniteMoeForCausalLM", "", {"tied": True}),
    ("Idefics3", "MixtralForCausalLM", "", {}),
    ("SmolVLM", "MixtralForCausalLM", "", {"tied": True}),
]
HERE = [row for row in ROWS if all(hasattr(transformers, f"{name}Config") for name in (row[0], row[2] or "Llama"))]


@torch.no_grad()
def _whole_logits(folder: Path, kind: str, tokens_BS: torch.Tensor, **pictures: torch.Tensor) -> torch.Tensor:
    with errors_only():
        whole_class = getattr(transformers, f"{kind}ForConditionalGeneration")
        model, found = whole_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()(input_ids=tokens_BS, attention_mask=torch.ones_like(tokens_BS), **pictures).logits


def _spell_anew(folder: Path) -> None:
    """Rename the text model's tensors to the names of other transformers releases."""
    other = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next((old for old in other if name.startswith(old)), "")
        renamed[other.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("kind", "hf_class", "text", "changes"), quick(HERE, ROWS[4], HERE[-2]), ids=str)
def test_the_text_is_a_parent(tmp_path: Path, kind: str, hf_class: str, text: str, changes: dict[str, Any]) -> None:
    folder, tokens = tmp_path / "dense", sample_tokens(250)
    write_tokenizer(write_wrapped(folder, kind, text=text, **{"vocab_size": 259} | changes))
    wanted = _whole_logits(folder, kind, tokens)
    weights = load_file(folder / "model.safetensors")
    total_bytes = sum(tensor.nbytes for tensor in weights.values())
    arch = read_architecture(folder)
    for spelled in ("as written", "anew"):
        if spelled == "anew":
            _spell_anew(folder)
        with open_dense(folder) as dense:
            check_source(dense)
            beside = left_out(dense.others())
            numbers = sum(dense.read(name).numel() for name in dense.names())
            assert dense.bytes_read == 4 * numbers
        assert arch.total_params == numbers
        assert sum(part["tensors"] for part in beside.values()) + len(list(dense.names())) == len(weights)
        assert sum(part["bytes"] for part in beside.values()) == total_bytes - 4 * numbers
        assert float((logits(folder, tokens) - wanted).norm() / wanted.norm()) <= EXACT
    buffers = arch.num_layers if arch.keeps_network else 0  # a factor per layer, not counted by transformers
    assert backends.load_model(folder)[0].num_parameters() + buffers == numbers
    if not hf_class:
        with pytest.raises(SpecError, match="fits no Hugging Face class"):
            converted(folder, tmp_path / "moe")
        return
    done = converted(folder, tmp_path / "moe", text_only=True)
    assert (done.hf_class, done.exact, done.left_out) == (hf_class, hf_class != EXPERTS, beside)
    assert float((logits(tmp_path / "moe", tokens) - wanted).norm() / wanted.norm()) <= EXACT
    assert verify(folder, tmp_path / "moe").equal


_PICTURE = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
#: Multimodal class that accepts a text model with experts -> picture, and number of tokens that the picture takes.
SEEN: dict[str, tuple[dict[str, torch.Tensor], int]] = {
    "Mistral3": ({"pixel_values": _PICTURE.repeat(1, 1, 1, 2), "image_sizes": torch.tensor([[28, 56]])}, 2),
    "Llava": ({"pixel_values": _PICTURE}, 4),
    "Idefics3": ({"pixel_values": _PICTURE[None]}, 1),
    "Qwen3VL": ({"pixel_values": torch.rand(8, 1176), "image_grid_thw": torch.tensor([[1, 2, 4]])}, 2),
    "SmolVLM": ({"pixel_values": _PICTURE[None]}, 1),
    "InternVL": ({"pixel_values": _PICTURE}, 1),
}
#: Multimodal class of a dense text model -> class for a text model with experts, if the two classes differ.
AROUND = {"Qwen3VL": "Qwen3VLMoe", "Qwen3_5": "Qwen3_5Moe"}
if hasattr(transformers, "Qwen3_5Config"):
    SEEN["Qwen3_5"] = SEEN["Qwen3VL"]
if hasattr(transformers, "Gemma4Config"):
    _PLACES = torch.tensor([[[column, row] for row in range(4) for column in range(4)]])
    SEEN["Gemma4"] = {"pixel_values": torch.rand(1, 16, 48), "image_position_ids": _PLACES}, 4
if hasattr(transformers, "HyperCLOVAXVisionV2Config"):
    SEEN["HyperCLOVAXVisionV2"] = SEEN["Qwen3VL"]
if hasattr(transformers, "MiniCPMOcrConfig"):
    SEEN["MiniCPMOcr"] = {"pixel_values": torch.rand(1, 3, 14, 14 * 8), "target_sizes": torch.tensor([[2, 4]])}, 2
if transformers.__version__ < "5":  # InternVL passes an argument that Qwen2-MoE does not accept
    del SEEN["InternVL"]


@pytest.mark.parametrize(
    ("kind", "shard_bytes"),
    quick([*zip(SEEN, [10**9, 50000] * 4, strict=False)], ("Llava", 50000), ("Qwen3VL", 50000)),
)
def test_the_upcycled_model_still_sees(tmp_path: Path, kind: str, shard_bytes: int) -> None:
    folder, (picture, count) = write_wrapped(tmp_path / "dense", kind, tied=kind in ("SmolVLM", "Gemma4")), SEEN[kind]
    (folder / "preprocessor_config.json").write_text("{}")
    done, again = (converted(folder, tmp_path / "moe", max_shard_bytes=shard_bytes) for _ in range(2))
    with open_dense(folder) as dense:
        beside = {other.name for other in dense.others()}
    made_kind = AROUND.get(kind, kind)
    assert (done.hf_class, done.left_out, again.bytes_written) == (f"{made_kind}ForConditionalGeneration", {}, 0)
    parent, made = (
        {name: tensor for file in one.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for one in (folder, tmp_path / "moe")
    )
    assert all(torch.equal(made[name], parent[name]) for name in beside)
    assert (tmp_path / "moe/preprocessor_config.json").is_file()
    text_tokens = sample_tokens(240, batch=1)
    tokens = text_tokens.clone()
    tokens[:, 3 : 3 + count] = 249
    if kind.startswith("Qwen3") and transformers.__version__ >= "5":  # the model must be told the picture's tokens
        picture = {**picture, "mm_token_type_ids": (tokens == 249).int()}
    wanted = _whole_logits(folder, kind, tokens, **picture)
    found = _whole_logits(tmp_path / "moe", made_kind, tokens, **picture)
    assert float((found - wanted).norm() / wanted.norm()) <= EXACT
    darker = {name: value * 0.5 if value.is_floating_point() else value for name, value in picture.items()}
    assert float((_whole_logits(folder, kind, tokens, **darker) - wanted).norm() / wanted.norm()) > EXACT
    alone, among = logits(tmp_path / "moe", text_tokens), _whole_logits(tmp_path / "moe", made_kind, text_tokens)
    assert float((alone - among).norm() / among.norm()) <= EXACT
    assert verify(folder, tmp_path / "moe", logits=False).equal is done.exact
    if made_kind != kind:  # transformers 5 saves experts as they are in memory, not in the published form
        getattr(transformers, done.hf_class).from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "saved")
        assert verify(folder, tmp_path / "saved", logits=False).equal
