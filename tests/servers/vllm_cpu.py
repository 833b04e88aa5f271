"""vLLM on a CPU: the greedy continuation of a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path


os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def greedy(folder: Path, dtype: str, prompt: list[int], count: int) -> list[int]:
    """Load a folder with vLLM's own loader, and return the likeliest tokens after a prompt.

    Args:
        folder: folder of the model; its tokenizer is not read.
        dtype: `float32` or `bfloat16`.
        prompt: token ids.
        count: number of tokens to return.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = LLM(str(folder), dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=64)
    try:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        return list(engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0].token_ids)
    finally:
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
