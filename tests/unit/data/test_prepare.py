from __future__ import annotations

import json
import shutil

import pytest

from nemo_upcycle.data.corpus import Document
from nemo_upcycle.data.prepare import TOKENIZER, data_arguments, heldout_documents, prepare_corpus
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.utils.files import is_complete, read_json, sha256_file


SEQUENCE = 16
CORPUS = {
    "train": [Document(f"t{number}", f"the text {number} that repeats " * 9) for number in range(12)],
    "validation": [Document("v0", "validation that stands apart " * 5)],
    "heldout": [Document("h0", "late\nspeech é\u2028"), Document("h1", "another")],
}


@pytest.fixture(scope="module")
def prepared(tiny_dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    return folder, prepare_corpus(CORPUS, tiny_dense, folder)


def _indexed(folder, split):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(data_arguments(folder)["paths"][split][0])
    return [dataset[number].tolist() for number in range(len(dataset))]


def test_datasets_hold_the_texts_each_closed_by_end_of_text(prepared, tiny_dense):
    from transformers import AutoTokenizer

    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    for split in ("train", "validation"):
        documents = _indexed(folder, split)
        assert all(ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1] for ids in documents)
        found = [tokenizer.decode(ids[:-1]) for ids in documents]
        assert sorted(found) == sorted(document.text for document in CORPUS[split])


def test_train_is_shuffled_always_alike(prepared, tiny_dense, tmp_path):
    folder, manifest = prepared
    again = prepare_corpus(CORPUS, tiny_dense, tmp_path / "again")
    assert again == manifest
    lengths_in_order = prepare_corpus({**CORPUS, "train": CORPUS["train"][::-1]}, tiny_dense, tmp_path / "reversed")
    assert lengths_in_order["splits"]["train"]["sha256"] != manifest["splits"]["train"]["sha256"]
    first = _indexed(folder, "train")[0]
    assert first != _encoded(tiny_dense, CORPUS["train"][0].text)


def _encoded(folder, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_the_manifest_counts_what_was_written(prepared):
    folder, manifest = prepared
    assert is_complete(folder)
    assert read_json(folder / "manifest.json") == manifest
    for split, entry in manifest["splits"].items():
        assert entry["documents"] == len(CORPUS[split])
        assert entry["text_bytes"] == sum(len(document.text.encode()) for document in CORPUS[split])
        assert entry["sha256"] == sha256_file(folder / entry["file"])
    assert manifest["splits"]["train"]["tokens"] == sum(map(len, _indexed(folder, "train")))


def test_heldout_texts_come_back_as_they_were(prepared, tmp_path):
    folder, _ = prepared
    assert heldout_documents(folder) == CORPUS["heldout"]
    with pytest.raises(UpcycleError, match=r"no _SUCCESS\.json.*run the pipeline's import stage"):
        heldout_documents(tmp_path)


def test_the_training_tokenizer_brings_no_weights_and_pads_with_an_unused_token(prepared, tiny_dense):
    folder, manifest = prepared
    assert not list((folder / TOKENIZER).glob("*.safetensors"))
    assert read_json(tiny_dense / "config.json")["pad_token_id"] == manifest["tokenizer"]["eos_id"]  # the trap
    pad = manifest["tokenizer"]["pad_id"]
    assert pad is not None
    assert all(pad not in ids for split in ("train", "validation") for ids in _indexed(folder, split))


def test_a_padding_token_that_the_texts_hold_is_passed_over(tiny_dense, tmp_path):
    corpus = {**CORPUS, "train": [Document("t", "chat <|endoftext|> the " * 20)]}
    assert prepare_corpus(corpus, tiny_dense, tmp_path / "one")["tokenizer"]["pad_id"] == 1
    corpus["validation"] = [Document("v", "chat <|im_start|> the " * 20)]
    assert prepare_corpus(corpus, tiny_dense, tmp_path / "two")["tokenizer"]["pad_id"] is None


@pytest.mark.parametrize("text", ["", "chat <|endoftext|><|im_start|> the "])
def test_nemo_reads_it_and_learns_the_end_of_text(tiny_dense, tmp_path, text):
    """The stock data module, whichever padding token was left: no target is masked, the mask is causal."""
    import torch
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    corpus = {**CORPUS, "train": [Document(one.id, text + one.text) for one in CORPUS["train"]]}
    manifest = prepare_corpus(corpus, tiny_dense, tmp_path / "corpus")
    module = llm.PreTrainingDataModule(
        **data_arguments(tmp_path / "corpus"),
        tokenizer=AutoTokenizer(str(tmp_path / "corpus" / TOKENIZER)),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        global_batch_size=2,
        num_workers=0,
    )
    module.build(4, 2, 1, 0)
    samples = [module._train_ds[number] for number in range(len(module._train_ds))]
    eos = manifest["tokenizer"]["eos_id"]
    assert sum(int((sample["labels"] == eos).sum()) for sample in samples) >= len(corpus["train"]) - 1
    assert all(bool(sample["loss_mask"].all()) for sample in samples)
    causal = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()
    assert torch.equal(samples[0]["attention_mask"], causal[None])  # True is masked
    assert (tmp_path / "corpus/indices").is_dir()
    module.io_dump(tmp_path / "context", yaml_attrs=[])  # what NeMo puts into every checkpoint
    copied = {path.name for path in (tmp_path / "context").rglob("*") if path.is_file()}
    assert "tokenizer.json" in copied
    assert not any(name.endswith(".safetensors") for name in copied)


def test_refuses_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="got none, expected one of tokenizer"):
        prepare_corpus(CORPUS, tmp_path, tmp_path / "out")


def test_refuses_a_damaged_tokenizer(tiny_dense, tmp_path):
    shutil.copy(tiny_dense / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected files that transformers reads"):
        prepare_corpus(CORPUS, tmp_path, tmp_path / "out")


def test_refuses_a_tokenizer_without_an_end(tiny_dense, tmp_path):
    folder = tmp_path / "endless"
    shutil.copytree(tiny_dense, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text())
        content.pop("eos_token")
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="set eos_token"):
        prepare_corpus(CORPUS, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
