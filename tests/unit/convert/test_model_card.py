"""The model card: lineage and licence of the parent, as the hub reads them, and how the model was made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.export import CardInfo, export_checkpoint
from nemo_upcycle.convert.model_card import add_scores, training_facts
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.package_info import __version__
from tests.models import write_llama, write_tokenizer
from tests.unit.convert.exports import SPEC, write_checkpoint


CARD = """---
license: llama3
license_name: the licence
license_link: LICENSE
language: [en, de]
base_model: us/grandparent
pipeline_tag: text2text-generation
widget: []
---
# Parent
license: of the text
"""


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    before, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), text


def _convert(parents: list[Path], output: Path, spec: UpcycleSpec) -> tuple[dict[str, Any], str]:
    with open_dense(parents) as dense:
        convert(dense, output, spec, progress=False)
    return _read(output)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A model in the hub's cache."""
    folder = write_llama(tmp_path / "models--us--small-1/snapshots/0a1b", layers=2)
    (folder / "README.md").write_text(CARD)
    return folder


def test_the_card_names_the_parent_and_its_licence(parent: Path, tmp_path: Path) -> None:
    spec = UpcycleSpec(num_experts=4, top_k=2, method="drop", drop_ratio=0.25)
    front, text = _convert([parent], tmp_path / "moe", spec)
    assert front == {
        "base_model": "us/small-1",
        "license": "llama3",
        "license_name": "the licence",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo-upcycle", "mixture-of-experts", "moe", "upcycling"],
    }
    for words in (
        "# moe",
        "| Made from | us/small-1 |",
        "UpcycleSpec(num_experts=4, top_k=2, method='drop', drop_ratio=0.25, router_std=0.02, seed=1234)",
        "| Computes | not the parent's function: drop_ratio=0.25 draws neurons anew |",
        f"nemo-upcycle convert, version {__version__}",
        "The parent's: the licence.",
    ):
        assert words in text
    assert str(tmp_path) not in text


def test_a_parent_without_a_name_on_the_hub_passes_on_its_own_base(parent: Path, tmp_path: Path) -> None:
    local = parent.rename(tmp_path / "local")
    front, text = _convert([local], tmp_path / "moe", SPEC)
    assert front["base_model"] == "us/grandparent"
    assert "| Made from | local, made from us/grandparent |" in text
    assert "| Computes | the parent's function, up to rounding |" in text


def test_several_parents_are_all_named(parent: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "models--them--other/snapshots/1", layers=2)
    (other / "README.md").write_text("---\nlicense: mit\n---\n")
    front, text = _convert([parent, other], tmp_path / "moe", SPEC)
    assert front["base_model"] == ["us/small-1", "them/other"]
    assert "license" not in front
    assert "The parents have several: llama3; mit" in text


@pytest.mark.parametrize("card", [None, "# no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n", "\xff---\n"])
def test_a_card_that_says_nothing_is_no_mistake(tmp_path: Path, card: str | None) -> None:
    dense = write_llama(tmp_path / "dense", layers=2)
    if card is not None:
        (dense / "README.md").write_text(card, encoding="latin-1")
    front, text = _convert([dense], tmp_path / "moe", SPEC)
    assert front.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "names none" in text


def test_an_exports_card_says_training_rounding_and_what_the_caller_knows(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense", layers=2)
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    lines = [{"step": 1, "tokens": 1024, "loss": 3.5}, {"step": 2, "tokens": 2048, "loss": 3.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    facts = training_facts(tmp_path / "metrics.jsonl", 2)
    assert facts == {"Training": "2 steps, 2,048 tokens, loss 3.2500 at the last"}
    assert training_facts(tmp_path / "metrics.jsonl", 3) == training_facts(tmp_path / "none", 1) == {}
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC, about=CardInfo(title="mine", facts=facts))
    _, text = _read(tmp_path / "hf")
    for words in ("# mine", "2,048 tokens", "float32 weights are rounded to bfloat16", "| Type | bfloat16 |"):
        assert words in text


def _loaded(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the card's own lines in its folder; return what they define."""
    (lines,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(lines.splitlines()) <= 3
    assert "trust_remote_code" not in lines
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(lines, found)
    return found


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_card_loads_the_model_in_three_lines(
    tmp_path: Path, tokenizer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_llama(tmp_path / "dense", layers=2, vocab_size=259)
    if tokenizer:
        write_tokenizer(dense)
    _, text = _convert([dense], tmp_path / "moe", SPEC)
    found = _loaded(tmp_path / "moe", text, monkeypatch)
    assert type(found["model"]).__name__ == "MixtralForCausalLM"
    assert ("tokenizer" in found) == tokenizer


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("asset://small", "asset://small, made from us/grandparent"),
        ("/data/models/dense", "dense, made from us/grandparent"),
        (None, "dense, made from us/grandparent"),
    ],
)
def test_an_export_names_the_parent_as_the_user_did_without_paths(
    tmp_path: Path, address: str | None, told: str
) -> None:
    dense = write_llama(tmp_path / "dense", layers=2)
    (dense / "README.md").write_text(CARD)
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC, about=CardInfo(parent=address))
    assert f"| Made from | {told} |" in _read(tmp_path / "hf")[1]


def test_what_the_files_hold_besides_parameters_is_said_in_plain_words(tmp_path: Path) -> None:
    _, text = _convert([write_llama(tmp_path / "dense", layers=2, tied=True, vocab_size=259)], tmp_path / "moe", SPEC)
    assert f"the embedding again as the output layer, {259 * 64:,} numbers" in text


def test_scores_replace_earlier_ones_and_leave_the_rest_of_the_card(tmp_path: Path) -> None:
    _, before = _convert([write_llama(tmp_path / "dense", layers=2)], tmp_path / "moe", SPEC)
    for value in ("0.25", "0.50"):
        add_scores(tmp_path / "moe", f"| acc | {value} |")
    _, text = _read(tmp_path / "moe")
    assert text.replace("## Scores\n\n| acc | 0.50 |\n\n", "") == before
    assert text.index("## Load it") < text.index("## Scores") < text.index("## Licence")


@pytest.mark.parametrize("foreign", ["link", "unmarked"])
def test_scores_go_into_no_card_of_somebody_else(tmp_path: Path, foreign: str) -> None:
    _convert([write_llama(tmp_path / "dense", layers=2)], tmp_path / "moe", SPEC)
    before, folder = (tmp_path / "moe/README.md").read_text(), tmp_path / "moe"
    if foreign == "link":
        folder = tmp_path / "hf"
        folder.symlink_to(tmp_path / "moe")
    else:
        (folder / "nemo_upcycle.json").unlink()
    add_scores(folder, "| acc | 1 |")
    assert (tmp_path / "moe/README.md").read_text() == before
