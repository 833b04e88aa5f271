"""Recipes made from a parent's folder: its settings in a NeMo configuration, and its function at step 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from nemo.collections.llm.gpt.model.gemma import GemmaConfig
from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig
from nemo.collections.llm.gpt.model.mistral import MistralConfig7B
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Config
from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import DECODER
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.recipes import upcycled_from
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.equivalence import check_step0
from nemo_upcycle.trainers.nemo.checks import check_own_data, check_parent, check_recipe
from nemo_upcycle.trainers.nemo.olmo2 import Olmo2Config
from nemo_upcycle.trainers.nemo.phi3mini import LongRopePhi3Config
from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe, model_config
from tests.models import (
    LLAMA3_SCALING,
    sample_tokens,
    write_exaone4,
    write_llama,
    write_mistral,
    write_olmo2,
    write_phi3,
    write_qwen2,
    write_qwen3,
    write_smollm3,
    write_tokenizer,
)
from tests.parents import write_gemma, write_granite, write_granite4, write_granite_swa, write_olmo3


SPEC = UpcycleSpec(num_experts=4, top_k=2)
SCALED = LLAMA3_SCALING | {"original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0 + 0.1 * n for n in range(6)]}
LONG |= {"long_factor": [2.0 + n for n in range(6)]}
#: Family -> how its parent is written, and NeMo's configuration of the family.
MADE: dict[str, tuple[Callable[..., Path], type]] = {
    "Llama 3.1": (partial(write_llama, rope_scaling=SCALED, tied=True), Llama31Config),
    "Mistral": (partial(write_mistral, window=None), MistralConfig7B),
    "Mistral with a window": (partial(write_mistral, window=16), MistralConfig7B),
    "Qwen2": (write_qwen2, Qwen2Config),
    "Qwen3": (write_qwen3, Qwen3Config),
    "Gemma": (write_gemma, GemmaConfig),
    "OLMo 2": (write_olmo2, Olmo2Config),
    "Phi-3.5": (
        partial(write_phi3, partial_rotary_factor=0.75, rope_scaling=LONG, original_max_position_embeddings=16),
        LongRopePhi3Config,
    ),
    "Granite": (write_granite, LlamaConfig),
    "Granite 4": (write_granite4, LlamaConfig),
    "GraniteSWA": (write_granite_swa, LlamaConfig),
    "OLMo 3": (write_olmo3, LlamaConfig),
    "SmolLM3": (write_smollm3, LlamaConfig),
    "EXAONE 4": (write_exaone4, LlamaConfig),
}


@pytest.mark.parametrize("name", MADE)
def test_a_recipe_from_a_folder_is_exact_at_step_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for kernel in ("FLASH", "FUSED", "UNFUSED"):  # Megatron's choice for the previous model
        monkeypatch.delenv(f"NVTE_{kernel}_ATTN", raising=False)
    write, kind = MADE[name]
    folder = write_tokenizer(write(tmp_path, vocab_size=259))
    use_cpu_backend()
    made = upcycled_from(str(folder), spec=SPEC, seq_length=64, global_batch_size=2, max_steps=3, lr=1e-4)
    recipe = load_recipe(dump_recipe(made))
    check_recipe(recipe)
    check_parent(recipe, Parent(str(folder)), remote=False)
    assert recipe.model.config.__fn_or_cls__ is kind
    arch, parent = architecture_of(recipe.model.config, 259), read_architecture(folder)
    for field in ("tied_embeddings", "qkv_bias", "rotary_percent", "rope_pattern", "attention_multiplier", *DECODER):
        assert getattr(arch, field) == getattr(parent, field), field
    configs = model_config(recipe), model_config(recipe, parent)
    receipt = check_step0(*configs, folder, SPEC, sample_tokens(259), None)
    assert receipt.exact
    assert receipt.equivalence["within_tolerance"], receipt.equivalence


def test_a_recipe_for_gpus_names_its_data(tmp_path: Path) -> None:
    sizes = {"seq_length": 64, "global_batch_size": 2, "max_steps": 3, "lr": 1e-4}
    make = partial(upcycled_from, str(write_tokenizer(write_llama(tmp_path, vocab_size=259))), spec=SPEC, **sizes)
    check_own_data(make(accelerator="cpu"))
    check_own_data(make(accelerator="gpu", data="/data/mine"))
    with pytest.raises(UpcycleError, match="Add data=FOLDER"):
        check_own_data(make(accelerator="gpu"))


@pytest.mark.parametrize(
    ("wrong", "value"),
    [("lr", float("nan")), ("max_steps", 0), ("min_lr", 1.0), ("warmup_steps", -1), ("num_nodes", 0), ("data", "")],
)
def test_a_recipe_of_numbers_that_make_no_sense_is_refused(wrong: str, value: object) -> None:
    sizes = {"seq_length": 64, "global_batch_size": 2, "max_steps": 3, "lr": 1e-4}
    with pytest.raises(SpecError) as refused:
        upcycled_from("/nosuch", spec=SPEC, **(sizes | {wrong: value}))
    assert refused.value.field == wrong
