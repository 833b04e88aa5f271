"""Checks of a finished data folder before a recipe trains on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.data.tokenizers import open_tokenizer, tokenizer_sha256
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER, read_json
from tests.blends import set_manifest, write_blend
from tests.models import write_llama, write_tokenizer


SEQUENCE = 16
TALKS, BOOKS = "tokens/talks_train_00_text_document", "tokens/books_train_{:02d}_text_document"


@pytest.fixture
def folder(tiny_dense: Path, tmp_path: Path) -> Path:
    return write_blend(tmp_path / "blend", tiny_dense)


def test_a_source_is_named_by_its_first_file(folder: Path) -> None:
    paths = open_blend(folder).paths(SEQUENCE)["train"]
    assert paths == ["0.3", str(folder / BOOKS.format(0)), "0.7", str(folder / TALKS)]


def test_order_and_address_of_sources_do_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron names its indices after the paths."""
    expected = open_blend(folder).paths(SEQUENCE)
    set_manifest(folder, sources=dict(reversed(read_json(folder / "manifest.json")["sources"].items())))
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to("blend")
    assert open_blend("blend").paths(SEQUENCE) == open_blend("link").paths(SEQUENCE) == expected


def test_validation_omits_sources_shorter_than_a_sequence(tiny_dense: Path, tmp_path: Path) -> None:
    splits = {"talks": {"validation": [20, 1]}, "books": {"validation": [1]}, "notes": {}}
    sources = {name: (1.0, {"train": [9], **held}) for name, held in splits.items()}
    blend = open_blend(write_blend(tmp_path / "blend", tiny_dense, sources))
    paths = blend.paths(seq_length=100)
    assert paths["validation"][1::2] == [str(blend.folder / "tokens/talks_validation_00_text_document")]
    assert paths["test"] == paths["validation"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lose_a_token(folder: Path) -> None:
    sources = read_json(folder / "manifest.json")["sources"]
    sources["books"]["splits"]["train"]["tokens"] += 1
    set_manifest(folder, sources=sources)


@pytest.mark.parametrize(
    ("said", "damage"),
    [
        ("Data folder {} is not finished: it has no _SUCCESS.json", lambda folder: (folder / MARKER).unlink()),
        ("Format of {}/manifest.json is texts 1; expected ", lambda folder: set_manifest(folder, format=1)),
        ("The train split of source books of {} has ", _lose_a_token),
        (f"{{}}/{BOOKS.format(1)}.bin has ", lambda folder: _cut(folder / f"{BOOKS.format(1)}.bin")),
        (f"{{}}/{BOOKS.format(1)}.idx has ", lambda folder: _cut(folder / f"{BOOKS.format(1)}.idx")),
        (f"{{}}/{TALKS}.bin does not exist", lambda folder: (folder / f"{TALKS}.bin").unlink()),
        (f"{{}}/{TALKS}.idx does not exist", lambda folder: (folder / f"{TALKS}.idx").unlink()),
        (f"{{}}/{TALKS}.idx has 3 bytes instead of ", lambda folder: (folder / f"{TALKS}.idx").write_bytes(b"abc")),
        (
            f"{{}}/{TALKS}.idx is not an index of Megatron's",
            lambda folder: (folder / f"{TALKS}.idx").write_bytes(bytes(999)),
        ),
    ],
)
def test_damaged_folder_is_refused(folder: Path, said: str, damage: Callable[[Path], object]) -> None:
    open_blend(folder)
    damage(folder)
    with pytest.raises(UpcycleError) as caught:
        open_blend(folder)
    assert str(caught.value).startswith(said.format(folder))


def test_validation_without_a_split_is_refused(tiny_dense: Path, tmp_path: Path) -> None:
    blend = open_blend(write_blend(tmp_path / "blend", tiny_dense, {"talks": (1.0, {"train": [90]})}))
    with pytest.raises(UpcycleError, match=r"The longest validation source of .* has 0"):
        blend.paths(seq_length=64)


@pytest.mark.parametrize("short", ["train", "validation"])
def test_a_sequence_has_one_token_more_than_its_length(tiny_dense: Path, tmp_path: Path, short: str) -> None:
    """The extra token is the target of the last token."""
    sources = {"talks": (1.0, {"train": [90], "validation": [90], short: [1]})}
    blend = open_blend(write_blend(tmp_path / "blend", tiny_dense, sources))
    (tokens,) = blend.tokens[short]["talks"].values()
    assert blend.paths(seq_length=tokens - 1)[short]
    what = {"train": "The train split of source talks", "validation": "The longest validation source"}[short]
    said = rf"{what} of .* has {tokens} tokens, but more than one sequence \({tokens} tokens\)"
    with pytest.raises(UpcycleError, match=said):
        blend.paths(seq_length=tokens)


def _with_another_tokenizer(folder: Path) -> Path:
    tokenizer = open_tokenizer(write_tokenizer(folder))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_data_of_another_tokenizer_are_refused(folder: Path, tiny_dense: Path, tmp_path: Path) -> None:
    other = _with_another_tokenizer(write_llama(tmp_path / "other", vocab_size=260))
    blend = open_blend(folder)
    blend.require_tokenizer_of(str(tiny_dense))
    with pytest.raises(UpcycleError, match=rf"Tokenizer of {blend.folder} is .*; expected .*{other}"):
        blend.require_tokenizer_of(str(other))


def test_saved_tokenizer_keeps_the_hash_of_its_parent(folder: Path) -> None:
    """An equal hash lets a training continue from a NeMo checkpoint, which contains the data folder's tokenizer."""
    own = tokenizer_sha256(open_tokenizer(folder / "tokenizer"))
    assert own == open_blend(folder).manifest["tokenizer"]["sha256"]


def test_megatron_checkpoint_brings_its_tokenizer_or_is_not_compared(
    folder: Path, tiny_dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "weights").mkdir(parents=True)
    (checkpoint / "weights/.metadata").touch()
    blend = open_blend(folder)
    blend.require_tokenizer_of(f"nemo://{checkpoint}")
    assert f"{checkpoint} has no tokenizer, so it was not compared" in caplog.text
    _with_another_tokenizer(checkpoint / "context/nemo_tokenizer")
    for address in (f"nemo://{checkpoint}", str(checkpoint)):
        with pytest.raises(UpcycleError, match="Tokenizer of "):
            blend.require_tokenizer_of(address)
