"""Let a model continue a suite's held-out prompts greedily, the same prompts for every model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


#: Tokens of a continuation: enough to read, and one or two seconds for a small model on two CPU cores.
NEW_TOKENS = 24


def continue_prompts(model: Any, tokenizer: Any, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Continue each prompt with the likeliest tokens, until the text ends or `NEW_TOKENS` are written.

    Does not use `model.generate`, which applies temperature and penalties of the folder's generation_config.json.

    Args:
        model: from `load_model`.
        tokenizer: likewise.
        prompts: dicts with `prompt`, from `build_suite`.

    Returns:
        The prompts, each with its `continuation`.
    """
    return [{**prompt, "continuation": _continue(model, tokenizer, prompt["prompt"])} for prompt in prompts]


def _continue(model: Any, tokenizer: Any, text: str) -> str:
    import torch

    tokens_1S = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    written: list[int] = []
    cache = None
    with torch.inference_mode():
        while len(written) < NEW_TOKENS:
            output = model(input_ids=tokens_1S, past_key_values=cache, use_cache=True)
            cache, tokens_1S = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
            if tokens_1S.item() == tokenizer.eos_token_id:
                break
            written.append(int(tokens_1S.item()))
    return str(tokenizer.decode(written))
