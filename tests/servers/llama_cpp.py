"""llama.cpp, as `scripts/llama_cpp.sh` downloads it: greedy continuations of Hugging Face folders, and chats."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


HOME = Path(os.environ.get("NEMO_UPCYCLE_LLAMA_CPP", Path(__file__).parents[2] / ".cache/llama_cpp"))


class NotServedError(Exception):
    """Converting or loading failed; the text is the last line of the output."""


def greedy(folder: Path, file: Path, dtype: str, prompt: Sequence[int], count: int) -> list[int]:
    """Convert a Hugging Face folder, load the result, and return the likeliest tokens after a prompt.

    Args:
        folder: folder of the model, with a tokenizer that llama.cpp knows.
        file: GGUF file to write.
        dtype: `f32` or `bf16`.
        prompt: token ids.
        count: number of tokens to return; fewer if one of them ends the text.

    Raises:
        NotServedError: llama.cpp cannot convert the folder or cannot load the result.
    """
    to_gguf(folder, file, dtype)
    return list(_ask("greedy.mjs", file, count, *map(str, prompt)))


def chat(file: Path, count: int, questions: Sequence[str]) -> list[dict[str, Any]]:
    """Chat greedily with the chat template of a GGUF file; each question follows the previous answers.

    Args:
        file: GGUF file.
        count: largest number of tokens in an answer.
        questions: the user's questions, one after the other.

    Returns:
        For each question the tokens of its `prompt`, the answer's `tokens` and `text`, and whether the text `ended`.

    Raises:
        NotServedError: llama.cpp cannot load the file, or the file has no template.
    """
    return list(_ask("chat.mjs", file, count, *questions))


def to_gguf(folder: Path, file: Path, dtype: str) -> None:
    """Convert a Hugging Face folder with llama.cpp's converter.

    Raises:
        NotServedError: The conversion failed.
    """
    script = HOME / "llama.cpp/convert_hf_to_gguf.py"
    words = [script, folder.resolve(), "--outfile", file.resolve(), "--outtype", dtype]
    _run([sys.executable, *map(str, words)], file.parent)


def _ask(script: str, file: Path, count: int, *words: str) -> Any:
    engine = HOME / script  # node looks for packages beside the script
    shutil.copyfile(Path(__file__).with_name(script), engine)
    return json.loads(_run(["node", str(engine), str(file), str(count), *words], HOME).splitlines()[-1])


def _run(command: list[str], folder: Path) -> str:
    # Hide the tests' own modules, because one of them has the same name as a package of the converter.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotServedError((done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1])
    return done.stdout
