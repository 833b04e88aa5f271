"""Build the training data of the recipes: NeMo's own data module over a corpus that is prepared on first use."""

# No postponed annotations, and Optional: NeMo-Run parses `data.seq_length=1024` by them.

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from filelock import FileLock

from nemo_upcycle.data.assets import writable_cache
from nemo_upcycle.data.corpus import load_corpus
from nemo_upcycle.data.dense import ensure_dense
from nemo_upcycle.data.prepare import MANIFEST, TOKENIZER, data_arguments, prepare_corpus
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import is_complete, read_json, require_complete


if TYPE_CHECKING:
    from nemo.collections.llm.gpt.data import PreTrainingDataModule


def corpus_data(
    dense: str,
    corpus: str = "sotu",
    folder: Optional[str] = None,  # noqa: UP045
    seq_length: int = 512,
    micro_batch_size: int = 1,
    global_batch_size: int = 4,
    num_workers: int = 0,
    seed: int = 1234,
) -> "PreTrainingDataModule":
    """Return NeMo's pretraining data module over a corpus, tokenised with the dense model's tokenizer.

    Args:
        dense: the dense model whose tokenizer is used, as in `ensure_dense`.
        corpus: a name in `conf/data`, or a YAML file.
        folder: a prepared corpus; None prepares `corpus` once, in the cache.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a micro batch.
        global_batch_size: sequences of a step, over all ranks.
        num_workers: processes that load data, per rank.
        seed: of the order of the sequences.

    Raises:
        UpcycleError: the corpus cannot be read or fetched, or a split is shorter than one sequence.

    Example:
        >>> recipe.data = run.Config(corpus_data, dense="/models/Llama-3-8B", corpus="mine.yaml")  # doctest: +SKIP
    """
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.data import PreTrainingDataModule

    prepared = Path(folder) if folder else _prepared(dense, corpus)
    _check_length(prepared, seq_length)
    return PreTrainingDataModule(
        **data_arguments(prepared),
        # Not the dense folder: NeMo copies the tokenizer's whole folder into every checkpoint.
        tokenizer=AutoTokenizer(pretrained_model_name=str(prepared / TOKENIZER)),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
        seed=seed,
        pin_memory=False,
    )


def _prepared(dense: str, corpus: str) -> Path:
    model, documents = ensure_dense(dense), load_corpus(corpus)
    # Corpora or tokenizers that share a name get separate folders.
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        digest.update((model / name).read_bytes() if (model / name).is_file() else b"")
    for split, members in documents.items():
        for document in members:
            digest.update(f"{split}\0{document.id}\0{document.text}\0".encode())
    output = writable_cache("corpora") / f"{Path(corpus).stem}-{model.name}-{digest.hexdigest()[:16]}"
    with FileLock(f"{output}.lock"):
        if not is_complete(output):
            prepare_corpus(documents, model, output)
    return output


def _check_length(prepared: Path, seq_length: int) -> None:
    require_complete(prepared, "corpus", "run the pipeline's import stage, or omit folder")
    for name, split in read_json(prepared / MANIFEST)["splits"].items():
        if name != "heldout" and split["tokens"] <= seq_length:
            raise UpcycleError(
                f"tokens of the {name} split in {prepared}",
                got=split["tokens"],
                expected=f"more than one sequence ({seq_length})",
                fix="give it more text or lower data.seq_length",
            )
