"""Token ids and bytes have the form that Megatron reads, and both tokenizer libraries give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nemo_upcycle.data.engine.tasks import load_plan
from nemo_upcycle.data.engine.tokenise import FASTOKENS, TOKENIZERS, choose_library, load_encode
from tests.data_engine.blend import END, sentence, tokenizer_json, write_jsonl, write_plan
from tests.data_engine.runs import everything, execute, run, stats, texts, tokens


ODD = ["", f"a{END}b <pad>", "if x:\n        y    = 1", "日本語 👩\u200d👧 \x1b", "é", "e\u0301 decomposed"]
TEXTS = [*map(sentence, range(300)), *ODD]


def _plan(folder: Path, **more: object) -> Path:
    return write_plan(folder, [{"files": [write_jsonl(folder / "some.jsonl", *TEXTS)]}], **more)


def _changed_tokenizer(folder: Path, **changes: object) -> Path:
    """Write a plan whose tokenizer.json has changed values."""
    plan = _plan(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return plan


def test_both_libraries_give_the_same_bytes(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    assert choose_library(load_plan(plan)) == (FASTOKENS, "")
    fast = execute(plan)
    assert stats(fast)["tokenizer"] == FASTOKENS
    first = everything(fast)
    slow = execute(_plan(tmp_path / "slow"), TOKENIZERS)
    assert stats(slow)["tokenizer"] == TOKENIZERS
    for name in ("tokens/00000.train.bin", "tokens/00000.train.idx"):
        assert everything(slow)[name] == first[name]
    assert texts(fast) == [text for text in TEXTS if text]


def test_ids_are_those_of_tokenizers_where_no_text_looks_special(tmp_path: Path) -> None:
    work = execute(_plan(tmp_path))
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = [text for text in TEXTS if text and END not in text]
    expected = [[*encoding.ids, 0] for encoding in reference.encode_batch(plain, add_special_tokens=False)]
    assert [ids for ids in tokens(work, 0) if ids in expected] == expected
    blanks = reference.token_to_id("    ")
    assert sum(ids.count(blanks) for ids in tokens(work, 0)) == 3  # this token was added, but is not special


@pytest.mark.parametrize("library", [FASTOKENS, TOKENIZERS])
def test_end_of_text_that_is_not_marked_special_stays_text(tmp_path: Path, library: str) -> None:
    added = json.loads(tokenizer_json())["added_tokens"]
    plan = _changed_tokenizer(tmp_path, added_tokens=[added[0] | {"special": False}, *added[1:]])
    ids, _ = load_encode(load_plan(plan), library)([END, f"x{END}"])
    assert 0 not in ids


@pytest.mark.parametrize("library", [FASTOKENS, TOKENIZERS])
def test_length_limit_of_the_tokenizer_cuts_no_text(tmp_path: Path, library: str) -> None:
    limit = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    plan = _changed_tokenizer(tmp_path, truncation=limit)
    ids, offsets = load_encode(load_plan(plan), library)([sentence(1)])
    assert len(ids) == offsets[-1] > 3


def test_tokenizer_that_fastokens_cannot_load(tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {END: 0, "?": 1, "the": 2}, "unk_token": "?"}
    others = {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "decoder": None}
    plan = _changed_tokenizer(tmp_path, model=words, **others)
    done = run(plan)
    assert done.returncode == 0
    assert done.stderr.startswith("fastokens cannot load the tokenizer (")
    assert done.stderr.endswith("tokenizers is used instead, which is slower and gives the same ids\n")
    assert done.stderr.count("\n") == 1
    assert stats(plan.parent)["tokenizer"] == TOKENIZERS
    assert tokens(plan.parent, 0)[0][1:3] == [1, 2]


@pytest.mark.parametrize("content", ["no JSON", '{"model": 3}'])
def test_damaged_tokenizer_is_one_line(tmp_path: Path, content: str) -> None:
    plan = _plan(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    done = run(plan)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tokenizer.json is not a usable tokenizer.json (" in done.stderr


def test_tokens_of_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    small, large = (execute(_plan(tmp_path / str(size), vocab_size=size)) for size in (1 << 16, (1 << 16) + 1))
    assert tokens(small, 0) == tokens(large, 0)
    sizes = [(work / "tokens" / "00000.train.bin").stat().st_size for work in (small, large)]
    assert sizes[1] == 2 * sizes[0]
