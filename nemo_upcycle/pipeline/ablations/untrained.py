"""Make the untrained parent of a grid: a tokenizer trained on the blend's texts, and random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.inputs import InputFile, list_inputs
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import output_folder


#: Number of characters on which the tokenizer is trained. Each source of the blend gives a share by its weight. The
#: training takes seconds.
_CHARACTERS = 20_000_000
_FIRST, _LAST, _PAD = "<s>", "</s>", "<pad>"
_SEED = 1234


def write_untrained(folder: Path, config: Any, blend: Blend, vocabulary: int, work: Path) -> Path:
    """Write a Hugging Face Llama with random weights and its own tokenizer.

    Args:
        folder: folder to write; an earlier one is replaced.
        config: NeMo's configuration of a model of these sizes, as a `run.Config`.
        blend: blend with the texts that train the tokenizer.
        vocabulary: vocabulary size, including the three special tokens.
        work: folder for texts of the blend that have to be rendered.

    Returns:
        `folder`.

    Raises:
        UpcycleError: the blend's files cannot be found, or contain too little text.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _trained_tokenizer(blend, vocabulary, work)
    heads = config.num_attention_heads
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.num_query_groups or heads,
            max_position_embeddings=config.seq_length,
            rope_theta=float(config.rotary_base),
            rms_norm_eps=config.layernorm_epsilon,
            tie_word_embeddings=config.share_embeddings_and_output_weights,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with output_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return folder


def _trained_tokenizer(blend: Blend, vocabulary: int, work: Path) -> Any:
    """Train a byte-level BPE tokenizer. The same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_FIRST, _LAST, _PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(blend, work), trainer)
    if (got := backend.get_vocab_size()) != vocabulary:
        raise UpcycleError(
            "The blend's texts",
            kind="state",
            got=f"are enough for a vocabulary of {got} tokens only, and the grid asks for {vocabulary} tokens",
            fix="lower parent.vocabulary in the grid, or add texts to the blend",
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=_FIRST, eos_token=_LAST, pad_token=_PAD)


def _texts(blend: Blend, work: Path) -> Iterator[str]:
    """Yield training texts of every source, up to a number of characters that is proportional to its weight."""
    sources = blend.config.sources
    weights = {name: source.weight or 1.0 for name, source in sources.items()}
    for name in sources:
        left = int(_CHARACTERS * weights[name] / sum(weights.values()))
        for file in list_inputs(blend, name, work).get("train", []):
            for text in _texts_of(file):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break
            if left <= 0:
                break


def _texts_of(file: InputFile) -> Iterator[str]:
    path = Path(file.path)
    if file.reader == "text":
        yield path.read_text(encoding="utf-8", errors="replace")
    elif file.reader == "jsonl" and path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    else:
        raise UpcycleError(
            f"File {path}",
            kind="refused",
            got=(
                f"is read by the reader {file.reader}, and the grid's tokenizer is trained on plain .txt or .jsonl "
                "files"
            ),
            fix="use a blend of such files, or give a parent (dense=)",
        )
