"""Blends are read from YAML and overridden by key, and every mistake is named."""

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


@pytest.mark.parametrize(
    ("override", "subject", "got"),
    [
        ("sources.speches.weight=2", "source", "speches"),
        ("sources.speeches.weight=.inf", "sources.speeches.weight", float("inf")),
        ("sources.speeches.on_hit=cutt", "sources.speeches.on_hit", "cutt"),
        ("sources.speeches.tokens=0", "sources.speeches.tokens", 0.0),
        ("sources.speeches.train=[]", "sources.speeches.train", "none"),
        ("sources.speeches.pii=[iban]", "sources.speeches.pii", "iban"),
        ("hold_out.validation=0.9", "hold_out.validation", 0.9),
        ("near_duplicates.bands=0", "near_duplicates.bands", 0),
        ("near_duplicates.ngrams=5", "near_duplicates: key", "ngrams"),
        ("heldout_overlap=1.5", "heldout_overlap", 1.5),
        ("seed=-1", "seed", -1),
    ],
)
def test_mistakes_are_named(override: str, subject: str, got: object) -> None:
    with pytest.raises(UpcycleError) as caught:
        read_blend("sotu", [override])
    assert caught.value.subject.endswith(f"sotu.yaml: {subject}")
    assert caught.value.got == got


def test_a_file_of_texts_is_a_blend_of_one_source(tmp_path: Path) -> None:
    blend = read_blend(tmp_path / "mine.jsonl.gz", ["sources.texts.options.text_key=content"])
    texts = blend.config.sources["texts"]
    assert (texts.train, texts.options) == ([f"{tmp_path}/mine.jsonl.gz"], {"text_key": "content"})
    assert blend.folder == tmp_path


def test_a_folder_and_a_pattern_are_blends_of_one_source(tmp_path: Path) -> None:
    (tmp_path / "mine/more").mkdir(parents=True)
    for name in ("a.jsonl", "b.txt.gz", "more/c.jsonl", "notes.md"):
        (tmp_path / "mine" / name).touch()
    blend = read_blend(tmp_path / "mine")
    assert blend.name == "mine"
    assert blend.config.sources["texts"].train == [f"{tmp_path}/mine/**/*{end}" for end in (".jsonl", ".txt.gz")]
    pattern = read_blend(tmp_path / "mine/*.jsonl")
    assert (pattern.name, pattern.config.sources["texts"].train) == ("mine", [f"{tmp_path}/mine/*.jsonl"])
    (tmp_path / "none").mkdir()
    with pytest.raises(
        UpcycleError, match=r"/none has no file in a supported text format .*\(\.txt, \.jsonl, \.parquet, compressed"
    ):
        read_blend(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seq_length: 3", "mine.yaml"),
        ("sources: {}", "sources is none; expected at least one"),
        ("sources: {web: {reader: files}}", "train"),
        ("sources: {'My web': {train: [a.txt]}}", "lower-case letters"),
        (
            "{sources: {web: {train: [x]}}, near_duplicates: {}, deduplicate: false}",
            "near_duplicates needs deduplicate: true",
        ),
    ],
)
def test_a_file_that_is_no_blend_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UpcycleError, match=said):
        read_blend(tmp_path / "mine.yaml")
