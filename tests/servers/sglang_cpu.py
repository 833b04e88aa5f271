"""SGLang on a CPU: the greedy continuation of a Hugging Face folder, as a program and as a function to run it.

    python -m tests.servers.sglang_cpu FOLDER DTYPE COUNT TOKEN...

The program is a separate process, because SGLang kills its own process if its scheduler fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def greedy(folder: Path, dtype: str, prompt: list[int], count: int) -> list[int]:
    """Load a folder with SGLang's own loader, and return the likeliest tokens after a prompt.

    Args:
        folder: folder of the model; its tokenizer is not read.
        dtype: `float32` or `bfloat16`.
        prompt: token ids.
        count: number of tokens to return.
    """
    command = [sys.executable, "-m", "tests.servers.sglang_cpu", str(folder), dtype, str(count), *map(str, prompt)]
    variables = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the tokens as JSON."""
    import sglang

    folder, dtype, count, *prompt = sys.argv[1:]
    # Use torch's attention, because SGLang's attention for CPUs needs AMX instructions.
    devices = {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch"}
    sizes = {"context_length": 64, "max_total_tokens": 256, "mem_fraction_static": 0.1, "max_running_requests": 2}
    engine = sglang.Engine(
        model_path=folder, dtype=dtype, skip_tokenizer_init=True, log_level="error", **devices, **sizes
    )
    sampling = {"temperature": 0, "max_new_tokens": int(count), "ignore_eos": True}
    answer = engine.generate(input_ids=[int(token) for token in prompt], sampling_params=sampling)
    sys.stdout.write(json.dumps(answer["output_ids"]) + "\n")
    sys.stdout.flush()
    engine.shutdown()


if __name__ == "__main__":
    main()
