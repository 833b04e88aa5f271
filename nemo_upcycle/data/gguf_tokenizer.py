"""The tokenizer of a GGUF file, as the files transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.utils.files import write_json


_CONTROL_TOKEN = 3  # ggml's token type of special tokens
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    No token is added at either end of a text, so that `decode(encode(text)) == text`. The chat template is kept.

    Args:
        fields: the metadata of the GGUF file, values by name.
        folder: an existing folder.

    Raises:
        CheckpointError: the tokenizer is not the byte-level BPE of the SmolLM family.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise CheckpointError(
            "tokenizer of the GGUF file",
            got=f"model {model}, pre-tokenizer {pre}",
            expected="model gpt2, pre-tokenizer smollm",
            fix="give the model as a Hugging Face folder that holds its own tokenizer files",
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # the tag `smollm` stands for this pair: without Digits, blanks before a number are split another way
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_settings(fields, special, folder)


def _write_settings(fields: dict[str, Any], special: list[str], folder: Path) -> None:
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in _ROLES.items()}
    roles = {role: tokens[number] for role, number in ids.items() if number is not None}
    settings = {
        **roles,
        "additional_special_tokens": [token for token in special if token not in roles.values()],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # Llama's forward refuses token_type_ids
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # every transformers release knows this one
    }
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", roles)
