"""NeMo models for parents with experts that NeMo itself cannot configure: step 0 with more experts is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nemo.collections import llm
from safetensors.torch import load_file

from nemo_upcycle.convert.offline import convert
from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.growth import growth_spec
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.recipes import upcycled
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.sources.resolve import open_dense
from nemo_upcycle.trainers.equivalence import check_step0
from nemo_upcycle.trainers.nemo.checks import check_parent
from nemo_upcycle.trainers.nemo.parent_model import parent_model
from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe, model_config
from tests.models import sample_tokens, write_tokenizer
from tests.parents import write_moe
from tests.tiers import quick


@pytest.mark.parametrize("kind", quick(["Qwen2Moe", "Glm4Moe", "FlexOlmo", "Olmoe"], "Qwen2Moe", "Glm4Moe"))
def test_step_0_has_the_bits_of_a_conversion(tmp_path: Path, kind: str) -> None:
    folder = write_tokenizer(write_moe(tmp_path / "dense", kind=kind, vocab_size=259))
    arch = read_architecture(folder)
    spec = growth_spec(arch, 8)
    use_cpu_backend()
    recipe = llm.mixtral_8x7b.pretrain_recipe()
    recipe.model = parent_model(str(folder), 64)
    recipe.model.config.apply_rope_fusion = False  # this kernel is not installed here
    made = load_recipe(dump_recipe(upcycled(recipe, str(folder), spec)))
    check_parent(made, Parent(str(folder)), remote=False)
    configs = model_config(made), model_config(made, arch)
    receipt = check_step0(*configs, folder, spec, sample_tokens(259), tmp_path / "online")
    assert (receipt.exact, receipt.equivalence["within_tolerance"]) == (True, True), receipt.equivalence
    assert (receipt.parent_experts, receipt.parent_active_params) == (4, arch.active_params)
    with open_dense(folder) as dense:
        convert(dense, tmp_path / "offline", spec, progress=False)
    online, offline = (load_file(tmp_path / name / "model.safetensors") for name in ("online", "offline"))
    assert online.keys() == offline.keys()
    assert [name for name in online if not torch.equal(online[name], offline[name])] == []


def test_a_recipe_of_other_experts_than_the_parents_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(write_moe(tmp_path / "dense", kind="Qwen2Moe", vocab_size=259))
    recipe = llm.mixtral_8x7b.pretrain_recipe()
    recipe.model = parent_model(str(folder), 64)
    spec = growth_spec(read_architecture(folder), 8)
    made = upcycled(recipe, str(folder), spec)
    made.model.config.moe_ffn_hidden_size = 96
    with pytest.raises(UpcycleError, match=r"model.config.moe_ffn_hidden_size is 96; expected 48"):
        check_parent(made, Parent(str(folder)), remote=False)
    made.resume.restore_config.spec.num_experts = 6
    with pytest.raises(UpcycleError, match=r"restore_config.spec.num_experts is 6; expected a multiple of"):
        check_parent(made, Parent(str(folder)), remote=False)
