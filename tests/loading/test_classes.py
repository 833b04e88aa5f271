"""Check that transformers loads every tensor that `convert` writes, and that exact models equal the parent.

`make test-all` uses the main environment's transformers release, and `make test-in ENV=tf5` uses the newest release.
The environment variable CASES sets the number of random models, and PARENTS sets which parents they have
(`SmolLM3,EXAONE 4`). `make test` runs four random models.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.utils.files import read_json
from tests.loading.cases import PARENTS as FOLDERS
from tests.loading.cases import Case, logits, outcome, outcome_of, random_case
from tests.loading.rows import PARENTS as ROWS
from tests.loading.rows import WEEKLY
from tests.models import sample_tokens
from tests.parents import write_wrapped
from tests.tiers import quick


pytestmark = pytest.mark.slow


CASES = int(os.environ.get("CASES", "12"))
PARENTS = [named.split(",")] if (named := os.environ.get("PARENTS")) else []
TOLERANCE = 2e-6
FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}
#: Rows whose converted model is exact. Parents inside a multimodal model are excluded.
EXACT = {
    name: row
    for name, row in (ROWS | WEEKLY).items()
    if row.hf_class and row.dtype is torch.float32 and "method" not in row.spec
    if getattr(row.write, "func", None) is not write_wrapped
}


@pytest.mark.skipif(bool(find_spec("nemo")), reason="tests/unit/models/test_parents.py compares the same")
@pytest.mark.parametrize("name", EXACT)
def test_every_class_computes_what_the_parent_does(tmp_path: Path, name: str) -> None:
    row = EXACT[name]
    found = outcome_of(row.write(tmp_path / "dense"), UpcycleSpec(**row.spec), tmp_path)
    assert (found.hf_class, found.is_exact) == (row.hf_class, True)
    assert found.relative <= TOLERANCE


@pytest.mark.parametrize("parent", ["InternLM3", "IQuest-Coder", "EXAONE 3"])
@pytest.mark.skipif(not hasattr(transformers, "ExaoneConfig"), reason="this release does not know these models")
def test_loads_llamas_by_another_name_as_transformers_does(tmp_path: Path, parent: str) -> None:
    folder, tokens = FOLDERS[parent](tmp_path, tied=True), sample_tokens(250)
    assert read_json(folder / "config.json")["architectures"] == ["LlamaForCausalLM"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(theirs(tokens).logits, logits(folder, tokens))


@pytest.mark.skipif(not hasattr(transformers, "Gemma4Config"), reason="this release does not know Gemma 4")
@pytest.mark.parametrize(("sizes", "spec"), [({}, {}), ({"attention_k_eq_v": False}, FINE | {"router_init": "zero"})])
def test_a_gemma_4_keeps_its_network_and_function(tmp_path: Path, sizes: dict[str, Any], spec: dict[str, Any]) -> None:
    for epsilon, most in ((1e-12, 2 * TOLERANCE), (1e-6, 1e-4)):
        found = outcome(
            Case("Gemma 4", sizes | {"rms_norm_eps": epsilon}, {"num_experts": 4, "router_std": 1.0} | spec),
            tmp_path / str(epsilon),
        )
        assert (found.hf_class, found.is_exact) == ("Gemma4ForCausalLM (enable_moe_block)", False)
        assert found.relative <= most


def test_small_router_logits_tie_in_transformers(tmp_path: Path) -> None:
    found = outcome(Case("Llama", {"layers": 2}, FINE | {"router_std": 1e-8}), tmp_path)
    assert not found.is_exact
    assert found.relative >= 1e-3


@pytest.mark.parametrize("seed", quick(range(CASES), *range(min(CASES, 4))))
def test_a_random_model_loads_whole_and_keeps_its_word(tmp_path: Path, seed: int) -> None:
    case = random_case(seed, *PARENTS)
    try:
        found = outcome(case, tmp_path)
    except SpecError as refused:
        if "fits no Hugging Face class" not in str(refused):
            raise
        return
    assert not found.is_exact or found.relative <= TOLERANCE, (case, found)
