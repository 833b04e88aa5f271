"""If a tied model also stores an output layer, equal weights are accepted, and other weights are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_upcycle import open_dense, upcycle_into
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.checks import check_source
from nemo_upcycle.sources.fetch import ensure_dense, import_dense
from tests.folders import SPEC, change_weights, converted
from tests.models import build_chunks, require_same_weights, weights_of, write_llama, write_tokenizer


WORDS = (
    r"lm_head\.weight differs from model\.embed_tokens\.weight, but tie_word_embeddings in config\.json is true"
    r".*Set tie_word_embeddings to false .*or remove lm_head\.weight"
)
Change = Callable[[torch.Tensor], torch.Tensor]


def _dense(folder: Path, change: Change | None) -> Path:
    """Write a tied Llama; with `change`, the file also has an output layer, which is the changed embedding."""
    write_tokenizer(write_llama(folder, tied=True, layers=2))
    head = change(weights_of(folder)["model.embed_tokens.weight"]) if change else None
    return change_weights(folder, {"lm_head.weight": head})


def _other_row(weight_VD: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight_VD[:-1], weight_VD[-1:] + 1])


@pytest.mark.parametrize("change", [torch.clone, torch.Tensor.double], ids=["same type", "wider type"])
def test_the_same_head_is_as_good_as_none(tmp_path: Path, change: Change) -> None:
    dense = _dense(tmp_path / "dense", change)
    converted(dense, tmp_path / "moe")
    converted(_dense(tmp_path / "bare", None), tmp_path / "bare_moe")
    require_same_weights(tmp_path / "moe", tmp_path / "bare_moe")
    assert import_dense(str(dense), tmp_path / "unused") == dense
    assert verify(dense, tmp_path / "moe").equal


@pytest.mark.parametrize("change", [torch.neg, _other_row, lambda weight_VD: weight_VD[:-1].clone()])
def test_another_head_is_refused_before_anything_is_written(tmp_path: Path, change: Change) -> None:
    dense, bare = _dense(tmp_path / "dense", change), _dense(tmp_path / "bare", None)
    with pytest.raises(CheckpointError, match=WORDS):
        converted(dense, tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "dense"]
    with pytest.raises(CheckpointError, match=WORDS):
        import_dense(str(dense), tmp_path / "unused")
    converted(bare, tmp_path / "moe")
    with pytest.raises(CheckpointError, match=WORDS):
        verify(dense, tmp_path / "moe", logits=False)


def test_a_wrong_shape_is_told_before_anything_is_compared(tmp_path: Path) -> None:
    folder = _dense(tmp_path / "dense", torch.clone)
    embedding = weights_of(folder)["model.embed_tokens.weight"].flatten()
    change_weights(folder, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()})
    words = r"shape of model\.embed_tokens\.weight is \[.*\]; expected \[250, 64\]"
    with open_dense(folder) as source:
        with pytest.raises(CheckpointError, match=words):
            check_source(source)
        assert source.bytes_read == 0


def test_of_several_parents_each_is_looked_at(tmp_path: Path) -> None:
    paths = [_dense(tmp_path / "one", None), _dense(tmp_path / "two", torch.neg)]
    with pytest.raises(CheckpointError, match=rf"two: {WORDS}"):
        converted(paths, tmp_path / "moe")


def test_what_many_ranks_open_at_once_is_sampled(tmp_path: Path, megatron: None) -> None:
    """Each rank compares 63 of 250 rows; a separately trained head differs in all rows."""
    with open_dense(_dense(tmp_path / "other", torch.neg)) as source:
        (chunk,) = build_chunks(source.path, num_experts=4)
        before = [parameter.clone() for parameter in chunk.parameters()]
        with pytest.raises(CheckpointError, match=WORDS):
            upcycle_into([chunk], source, SPEC)
        assert all(torch.equal(*pair) for pair in zip(before, chunk.parameters(), strict=True))
        with pytest.raises(CheckpointError, match=WORDS):
            ensure_dense(str(source.path))
    with open_dense(_dense(tmp_path / "same", torch.clone)) as source:
        receipt = upcycle_into([chunk], source, SPEC)
        assert receipt.exact
        assert receipt.bytes_read <= 1.01 * receipt.bytes_needed
        assert source.bytes_read - receipt.bytes_read == 2 * 63 * 64 * 4
