"""Blends are read from YAML, overridden by key, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.errors import UpcycleError


PACKAGED = [path.stem for path in (Path(__file__).parents[3] / "conf/data").glob("*.yaml")]


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_blend_is_valid(name: str) -> None:
    blend = read_blend(name)
    assert blend.name == name
    assert sum(blend.share(source) for source in blend.config.sources) == pytest.approx(1)


def test_the_papers_blends_are_seven_to_three() -> None:
    for name in ("redpajama_v2_academic_7_3", "fineweb_edu_academic_7_3"):
        blend = read_blend(name)
        web, *academic = blend.config.sources
        assert blend.share(web) == pytest.approx(0.7)
        assert len(academic) == 5


def test_overrides_change_weights_length_and_tokenizer() -> None:
    blend = read_blend(
        "fineweb_edu_academic_7_3", ["sources.flan.weight=0.2", "seq_length=4096", "tokenizer=asset://smollm2-135m"]
    )
    assert blend.config.sources["flan"].weight == 0.2
    assert (blend.config.seq_length, blend.config.tokenizer) == (4096, "asset://smollm2-135m")
    assert blend.config.sources["fineweb_edu"].weight == 0.7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sources.speches.weight=2", "source 'speches' does not exist. Did you mean 'speeches'?"),
        ("sources.speeches.weights=2", "key 'weights' does not exist. Did you mean 'weight'?"),
        ("sources.speeches.weight=0", "weight: got 0.0, expected more than 0"),
        ("sources.speeches.weight=much", "sources.speeches.weight: got 'much', expected a number"),
        ("sources.speeches.on_hit=cutt", "on_hit 'cutt' does not exist. Did you mean 'cut'?"),
        ("sources.speeches.tokens=0", "tokens: got 0.0, expected 1 or more"),
        ("sources.speeches.train=[]", "train: got none, expected at least one entry"),
        ("seqlength=3", "key 'seqlength' does not exist. Did you mean 'seq_length'?"),
        ("hold_out.validation=0.9", "hold_out.validation: got 0.9, expected 0 to 0.5"),
        ("near_duplicates.bands=0", "near_duplicates.bands: got 0, expected 1 to 100"),
        ("near_duplicates.ngrams=5", "key 'ngrams' does not exist. Did you mean 'n_grams'?"),
        ("heldout_overlap=1.5", "heldout_overlap: got 1.5, expected 0 to 1"),
        ("hold_out.test=0.1", "key 'test' does not exist"),
        ("sources.speeches.weight=.inf", "weight: got inf, expected more than 0"),
        ("sources.speeches.train=a.txt", "train: got 'a.txt', expected a list, each text. Fix: write ['a.txt']"),
        ("tokenizer=[abc", "got tokenizer=[abc, expected KEY=VALUE"),
        ("seed=-1", "seed: got -1, expected 0 or more"),
        ("sources.speeches.max_lost=2", "sources.speeches.max_lost: got 2.0, expected 0 to 1"),
        ("max_epochs=0", "max_epochs: got 0.0, expected more than 0"),
        ("pii=[mail]", "pii 'mail' does not exist. Did you mean 'email'?"),
        ("sources.speeches.pii=[iban]", "sources.speeches.pii 'iban' does not exist"),
    ],
)
def test_mistakes_are_named(override: str, words: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        read_blend("sotu", [override])
    assert words in str(caught.value)


def test_a_file_of_texts_is_a_blend_of_one_source(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl.gz"
    blend = read_blend(path, ["sources.texts.options.text_key=content"])
    assert blend.config.sources["texts"].train == [str(path)]
    assert blend.config.sources["texts"].options == {"text_key": "content"}
    assert blend.folder == tmp_path


def test_a_file_without_sources_is_refused(tmp_path: Path) -> None:
    for content in ("seq_length: 3\n", "sources: {}\n", "sources: [a]\n", "sources: {web: {reader: files}}\n"):
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(UpcycleError, match=r"mine\.yaml"):
            read_blend(tmp_path / "mine.yaml")


def test_a_name_that_cannot_be_a_file_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("sources: {'My web': {train: [a.txt]}}\n")
    with pytest.raises(UpcycleError, match="lower-case letters"):
        read_blend(tmp_path / "mine.yaml")
