"""Models that NeMo has not, or not whole: they are filled at step 0 and compute what their parents do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from nemo.collections.llm.gpt.model.llama import LlamaConfig
from nemo.collections.llm.recipes import llama3_8b

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import DECODER
from nemo_upcycle.models.megatron_config import architecture_of, moe_fields, router_fields
from nemo_upcycle.recipes import upcycled
from nemo_upcycle.recipes.common import change_model
from nemo_upcycle.trainers.equivalence import check_step0
from nemo_upcycle.trainers.nemo.decoder import decoder_model
from nemo_upcycle.trainers.nemo.olmo2 import Olmo2Config, Olmo2Model
from nemo_upcycle.trainers.nemo.phi3mini import LongRopePhi3Config, phi3_model
from tests.models import sample_tokens, write_exaone4, write_olmo2, write_phi3, write_smollm3
from tests.parents import write_granite, write_granite4, write_olmo3


SPEC = UpcycleSpec(num_experts=4, top_k=2)
LONG = {"short_factor": [1.0 + 0.1 * n for n in range(6)], "long_factor": [2.0 + n for n in range(6)]}


def _phi35(folder: Path) -> tuple[Path, run.Config]:
    write_phi3(
        folder,
        vocab_size=259,
        partial_rotary_factor=0.75,
        rope_scaling=LONG | {"type": "longrope"},
        original_max_position_embeddings=16,
    )
    return folder, phi3_model(str(folder), seq_length=64)


def _olmo2(folder: Path) -> tuple[Path, run.Config]:
    arch = read_architecture(write_olmo2(folder, vocab_size=259))
    config = run.Config(
        Olmo2Config,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        layernorm_epsilon=arch.norm_eps,
        rotary_base=arch.rope_theta,
        vocab_size=259,
        seq_length=64,
    )
    return folder, run.Config(Olmo2Model, config=config)


def _decoder(write: Any, folder: Path) -> tuple[Path, run.Config]:
    return write(folder, vocab_size=259), decoder_model(str(folder), seq_length=64)


_DECODERS = [partial(_decoder, write) for write in (write_granite, write_granite4, write_olmo3, write_smollm3)]


@pytest.mark.parametrize("write", [_phi35, _olmo2, *_DECODERS, partial(_decoder, write_exaone4)])
def test_step_0_of_a_model_of_this_package_is_its_parents(tmp_path: Path, write: Any) -> None:
    folder, model = write(tmp_path / "dense")
    moe = moe_fields(SPEC, model.config.ffn_hidden_size, model.config.num_layers) | router_fields(SPEC)
    dense = fdl.build(model.config)
    receipt = check_step0(fdl.build(change_model(model, **moe).config), dense, folder, SPEC, sample_tokens(259), None)
    assert receipt.exact
    assert receipt.equivalence["within_tolerance"]


def test_a_recipe_with_such_a_model_is_upcycled(tmp_path: Path) -> None:
    stock = llama3_8b.pretrain_recipe()
    kinds = ((_phi35, LongRopePhi3Config), (_olmo2, Olmo2Config), *((one, LlamaConfig) for one in _DECODERS))
    for number, (write, kind) in enumerate(kinds):
        folder, stock.model = write(tmp_path / str(number))
        recipe = upcycled(stock, dense=str(folder), spec=SPEC)
        assert recipe.model.config.__fn_or_cls__ is kind
        arch, parent = architecture_of(recipe.model.config, 259), read_architecture(folder)
        for name in ("rotary_percent", "qk_norm", "rope_pattern", "attention_multiplier", *DECODER):
            assert getattr(arch, name) == getattr(parent, name), name
