"""The prompts that a calibration runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.data.calibration_sample import calibration_sample
from nemo_upcycle.data.tokenizers import open_tokenizer
from nemo_upcycle.errors import UpcycleError


def _spec(folder: Path, text: str) -> UpcycleSpec:
    """Write a file of prompts, and return a spec that names the file."""
    (folder / "prompts.yaml").write_text(text)
    return UpcycleSpec(num_experts=2, top_k=2, router_init="prompts", router_prompts=str(folder / "prompts.yaml"))


def test_prompts_are_read_for_each_copy(tiny_dense: Path, tmp_path: Path) -> None:
    spec = _spec(tmp_path, "- [how to bake, flour and eggs]\n- the court rules\n")
    sample = calibration_sample(spec, tiny_dense)
    assert sample.labels == (0, 0, 1)
    assert sample.batches[1].tolist() == [open_tokenizer(tiny_dense)("flour and eggs")["input_ids"]]
    assert sample.about["prompts"] == spec.router_prompts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- one\n", "prompts.yaml has 1 entry: the spec makes 2 copies"),
        ("- one\n- [two, 3]\n", "prompts.yaml is not a list of texts: the spec makes 2 copies"),
        ("one: two\n", "prompts.yaml is not a list of texts: the spec makes 2 copies"),
        ("- [one\n", "prompts.yaml is not valid YAML: while parsing"),
    ],
)
def test_other_files_are_no_prompts(tiny_dense: Path, tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UpcycleError) as refused:
        calibration_sample(_spec(tmp_path, text), tiny_dense)
    assert said in str(refused.value)
