"""The model card: the parent's lineage and licence in the hub's format, and how the model was made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import CardInfo, export_checkpoint
from nemo_upcycle.convert.model_card import add_section, training_facts
from tests.folders import SPEC, converted
from tests.models import write_llama, write_tokenizer
from tests.unit.convert.exports import write_checkpoint


LICENCE = {"license": "llama3", "license_name": "the licence", "license_link": "LICENSE", "language": ["en", "de"]}
CARD = f"""---
{yaml.safe_dump(LICENCE | {"base_model": "us/grandparent", "pipeline_tag": "other", "widget": []})}---
# Parent
license: of the text
"""


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    before, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), text


def _convert(parents: list[Path], output: Path, spec: UpcycleSpec = SPEC) -> tuple[dict[str, Any], str]:
    return _read(converted(parents, output, spec).output)


def _parent(dense: Path, folder: Path, card: str | None = CARD) -> Path:
    """Copy a parent without a tokenizer, with this model card or without a card."""
    shutil.copytree(dense, folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="latin-1")
    return folder


def test_the_card_names_the_parent_and_its_licence(dense: Path, tmp_path: Path) -> None:
    parent = _parent(dense, tmp_path / "models--us--small-1/snapshots/0a1b")
    front, text = _convert([parent], tmp_path / "moe", UpcycleSpec(num_experts=4, method="drop", drop_ratio=0.25))
    tags = ["nemo-upcycle", "mixture-of-experts", "moe", "upcycling"]
    fixed = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    assert front == {"base_model": "us/small-1"} | LICENCE | fixed
    for words in (
        "# moe",
        "| Made from | us/small-1 |",
        "UpcycleSpec(num_experts=4, top_k=2, method='drop', drop_ratio=0.25, router_std=0.02, seed=1234)",
        "| Made to compute | not the parent's function: drop_ratio=0.25 redraws some neurons |",
        "The parent's licence: the licence.",
    ):
        assert words in text
    assert str(tmp_path) not in text


def test_names_parents_that_are_not_on_the_hub(dense: Path, tmp_path: Path) -> None:
    local = _parent(dense, tmp_path / "local")
    front, text = _convert([local], tmp_path / "moe")
    assert front["base_model"] == "us/grandparent"
    assert "| Made from | local, made from us/grandparent |" in text
    assert "| Made to compute | the parent's function, up to rounding |" in text
    other = _parent(dense, tmp_path / "models--them--other/snapshots/1", "---\nlicense: mit\n---\n")
    front, text = _convert([local, other], tmp_path / "mixed")
    assert front["base_model"] == ["us/grandparent", "them/other"]
    assert "license" not in front
    assert "The parents have several licences: llama3; mit" in text


@pytest.mark.parametrize("card", [None, "# no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n", "\xff---\n"])
def test_a_card_that_says_nothing_is_no_mistake(dense: Path, tmp_path: Path, card: str | None) -> None:
    front, text = _convert([_parent(dense, tmp_path / "dense", card)], tmp_path / "moe")
    assert front.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "names no licence" in text


@pytest.mark.parametrize(
    ("address", "told"), [("asset://small", "asset://small"), ("/data/models/dense", "dense"), (None, "dense")]
)
def test_an_exports_card_says_what_is_known(dense: Path, tmp_path: Path, address: str | None, told: str) -> None:
    parent, checkpoint = _parent(dense, tmp_path / "dense"), write_checkpoint(tmp_path / "ck", dense, SPEC)
    lines = [{"step": 1, "tokens": 1024, "loss": 3.5}, {"step": 2, "tokens": 2048, "loss": 3.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    facts = training_facts(tmp_path / "metrics.jsonl", 2)
    assert facts == {"Training": "2 steps, 2,048 tokens, last loss 3.2500"}
    assert training_facts(tmp_path / "metrics.jsonl", 3) == training_facts(tmp_path / "none", 1) == {}
    about = CardInfo(title="mine", facts=facts, parent=address)
    _, text = _read(export_checkpoint(checkpoint, parent, tmp_path / "hf", spec=SPEC, about=about))
    made_from = f"| Made from | {told}, made from us/grandparent |"
    for words in ("# mine", "2,048 tokens", "float32 weights are rounded to bfloat16", made_from):
        assert words in text


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_card_loads_the_model_in_three_lines(tmp_path: Path, tokenizer: bool, monkeypatch: Any) -> None:
    dense = write_llama(tmp_path / "dense", layers=1, vocab_size=259, tied=True)
    if tokenizer:
        write_tokenizer(dense)
    _, text = _convert([dense], tmp_path / "moe")
    assert f"a copy of the embedding as the output layer ({259 * 64:,} numbers)" in text
    (lines,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(lines.splitlines()) <= 3
    assert "trust_remote_code" not in lines
    monkeypatch.chdir(tmp_path / "moe")
    found: dict[str, Any] = {}
    exec(lines, found)
    assert type(found["model"]).__name__ == "MixtralForCausalLM"
    assert ("tokenizer" in found) == tokenizer


def test_card_and_command_name_the_argument_for_uneven_experts(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense", layers=1, intermediate_size=344)
    fine = UpcycleSpec(num_experts=8, top_k=4, granularity=2)
    for dtype, needed in ((torch.bfloat16, True), (torch.float32, False)):  # rows of 172 numbers: 344 and 688 bytes
        done = converted(dense, tmp_path / str(dtype), fine, dtype=dtype)
        (lines,) = re.findall(r"^```python\n(.*?)^```$", _read(done.output)[1], re.DOTALL | re.MULTILINE)
        assert ('dtype="auto", experts_implementation="eager")' in lines) is needed
        assert any("experts_implementation" in caveat for caveat in done.caveats) is needed


def test_scores_replace_only_our_own_earlier_scores(dense: Path, tmp_path: Path) -> None:
    _, before = _convert([dense], tmp_path / "moe")
    for value in ("0.25", "0.50"):
        add_section(tmp_path / "moe", "Scores", f"| acc | {value} |")
    _, text = _read(tmp_path / "moe")
    assert text.replace("## Scores\n\n| acc | 0.50 |\n\n", "") == before
    assert text.index("## Load it") < text.index("## Scores") < text.index("## Licence")
    (tmp_path / "link").symlink_to(tmp_path / "moe")
    add_section(tmp_path / "link", "Scores", "| acc | 1 |")
    (tmp_path / "moe/nemo_upcycle.json").unlink()
    add_section(tmp_path / "moe", "Scores", "| acc | 1 |")
    assert _read(tmp_path / "moe")[1] == text
