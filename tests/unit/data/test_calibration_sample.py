"""What a calibration runs on: windows of a blend by its shares, as many of each source, or prompts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.data.calibration_sample import WINDOW_TOKENS, blend_sample, calibration_sample, prompts_sample
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.data.indexed_dataset import read_tokens
from nemo_upcycle.data.tokenizers import open_tokenizer
from nemo_upcycle.errors import SpecError, UpcycleError
from tests.blends import set_manifest, write_blend
from tests.models import write_llama, write_tokenizer


KMEANS = UpcycleSpec(num_experts=4, top_k=2, router_init="kmeans")
RIDGE = UpcycleSpec(num_experts=2, top_k=2, router_init="ridge")
#: Of some 40 tokens a document: 50 windows of talks, and 12 of books in two files.
SOURCES: dict[str, Any] = {"talks": (0.75, {"train": [700]}), "books": (0.25, {"train": [120, 60]})}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=1))


@pytest.fixture(scope="module")
def blend(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blend(tmp_path_factory.mktemp("blends") / "blend", dense, SOURCES)


def test_sources_have_windows_by_their_shares(blend: Path) -> None:
    sample = blend_sample(open_blend(blend), KMEANS, 20 * WINDOW_TOKENS)
    assert sample.about["windows"] == {"books": 5, "talks": 15}
    assert sample.labels == (0,) * 5 + (1,) * 15
    assert {tuple(batch.shape) for batch in sample.batches} == {(1, WINDOW_TOKENS)}
    assert sample.tokens == 20 * WINDOW_TOKENS


def test_a_window_is_tokens_in_a_row_of_the_file(blend: Path) -> None:
    sample = blend_sample(open_blend(blend), KMEANS, 8 * WINDOW_TOKENS)
    dataset = IndexedDataset(str(blend / "tokens/talks_train_00_text_document"))
    tokens = torch.cat([torch.from_numpy(dataset[number].astype("int64")) for number in range(len(dataset))])
    windows = {tuple(window.tolist()) for window in tokens.split(WINDOW_TOKENS)}
    talks = [batch for batch, label in zip(sample.batches, sample.labels, strict=True) if label == 1]
    assert talks
    assert {tuple(batch[0].tolist()) for batch in talks} <= windows
    assert len({tuple(batch[0].tolist()) for batch in talks}) == len(talks)
    assert read_tokens(blend / "tokens/talks_train_00_text_document", 100, 7).tolist() == tokens[100:107].tolist()


def test_the_seed_chooses_the_windows(blend: Path) -> None:
    def digest(seed: int) -> str:
        spec = UpcycleSpec(num_experts=4, top_k=2, router_init="kmeans", seed=seed)
        return str(blend_sample(open_blend(blend), spec, 8 * WINDOW_TOKENS).about["sha256"])

    assert digest(1) == digest(1) != digest(2)


def test_all_there_is_is_taken_where_more_is_asked_for(blend: Path) -> None:
    windows = blend_sample(open_blend(blend), KMEANS, 10**6).about["windows"]
    assert windows["talks"] == sum(open_blend(blend).tokens["train"]["talks"].values()) // WINDOW_TOKENS


def test_sources_that_are_told_apart_have_as_many_windows(blend: Path) -> None:
    assert blend_sample(open_blend(blend), RIDGE, 9 * WINDOW_TOKENS).about["windows"] == {"books": 4, "talks": 4}


def test_a_ridge_needs_a_source_for_each_copy(blend: Path) -> None:
    spec = UpcycleSpec(num_experts=6, top_k=2, granularity=2, router_init="ridge")
    with pytest.raises(SpecError, match=r"ridge, with 3 copies, .*: 2 \(books, talks\).*num_experts=4"):
        blend_sample(open_blend(blend), spec)


def test_a_source_without_a_window_is_refused_where_it_counts(dense: Path, tmp_path: Path) -> None:
    sources = {"talks": (0.9, {"train": [40]}), "books": (0.1, {"train": [3]})}
    short = open_blend(write_blend(tmp_path / "blend", dense, sources))
    assert blend_sample(short, KMEANS).about["windows"]["books"] == 0
    with pytest.raises(UpcycleError, match=r"source books of .*: got no window of text"):
        blend_sample(short, RIDGE)


def test_a_blend_is_needed_and_has_to_be_of_the_models_tokenizer(dense: Path, blend: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="data: got none"):
        calibration_sample(KMEANS, dense, None)
    other = shutil.copytree(blend, tmp_path / "other")
    set_manifest(other, tokenizer={"sha256": "0" * 64})
    with pytest.raises(UpcycleError, match="tokenizer of"):
        calibration_sample(KMEANS, dense, other)


def test_prompts_are_read_for_each_copy(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("- [how to bake, flour and eggs]\n- the court rules\n")
    spec = UpcycleSpec(num_experts=2, top_k=2, router_init="prompts", router_prompts=str(file))
    sample = calibration_sample(spec, dense, None)
    assert sample.labels == (0, 0, 1)
    tokenizer = open_tokenizer(dense)
    assert sample.batches[1].tolist() == [tokenizer("flour and eggs")["input_ids"]]
    assert sample.about["prompts"] == str(file)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("- one\n", "a list of 1, expected a list of 2"),
        ("- one\n- [two, 3]\n", "something else"),
        ("- one\n- []\n", "something else"),
        ("one: two\n", "something else"),
        ("- [one\n", "while parsing"),
    ],
)
def test_other_files_are_no_prompts(dense: Path, tmp_path: Path, text: str, got: str) -> None:
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(UpcycleError, match=f"prompts in .*: got {got}"):
        prompts_sample(tmp_path / "prompts.yaml", dense, 2)
