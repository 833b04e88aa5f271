"""vLLM on a CPU: the greedy continuation of a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np


os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def greedy(
    folder: Path, dtype: str, prompt: list[int], count: int, picture: np.ndarray[Any, Any] | None = None
) -> list[int]:
    """Load a folder with vLLM's own loader, and return the likeliest tokens after a prompt.

    Args:
        folder: folder of the model. Its tokenizer is read only with a processor of pictures, which needs it.
        dtype: `float32` or `bfloat16`.
        prompt: token ids.
        count: number of tokens to return.
        picture: picture [height, width, RGB] for the picture token of the prompt.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    sees = (folder / "processor_config.json").is_file()
    engine = LLM(str(folder), dtype=dtype, enforce_eager=True, skip_tokenizer_init=not sees, max_model_len=64)
    asked: Any = {"prompt_token_ids": prompt}
    if picture is not None:
        asked["multi_modal_data"] = {"image": picture}
    try:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        return list(engine.generate([asked], sampling, use_tqdm=False)[0].outputs[0].token_ids)
    finally:
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
