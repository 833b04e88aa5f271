"""llama.cpp, as `scripts/llama_cpp.sh` fetches it: the greedy continuation of a Hugging Face folder, and a chat."""

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
    """Converting or loading failed; the text is the last line that was said."""


def greedy(folder: Path, file: Path, dtype: str, prompt: Sequence[int], count: int) -> list[int]:
    """Convert a Hugging Face folder, load it and return the likeliest tokens behind a prompt.

    Args:
        folder: the model, with a tokenizer that llama.cpp knows.
        file: the GGUF to write.
        dtype: `f32` or `bf16`.
        prompt: token ids.
        count: tokens to return; fewer if one of them ends the text.

    Raises:
        NotServedError: llama.cpp cannot convert it or cannot load it.
    """
    to_gguf(folder, file, dtype)
    return list(_ask("greedy.mjs", file, count, *map(str, prompt)))


def chat(file: Path, count: int, questions: Sequence[str]) -> list[dict[str, Any]]:
    """Chat with the chat template that a GGUF carries, greedily; each question follows the answers before it.

    Args:
        file: the GGUF.
        count: tokens of an answer, at most.
        questions: of the user, one after the other.

    Returns:
        For each question the tokens of its `prompt`, the answer's `tokens` and `text`, and whether it `ended` itself.

    Raises:
        NotServedError: llama.cpp cannot load it, or it has no template.
    """
    return list(_ask("chat.mjs", file, count, *questions))


def to_gguf(folder: Path, file: Path, dtype: str) -> None:
    """Convert a Hugging Face folder with llama.cpp's converter.

    Raises:
        NotServedError: it cannot.
    """
    script = HOME / "llama.cpp/convert_hf_to_gguf.py"
    words = [script, folder.resolve(), "--outfile", file.resolve(), "--outtype", dtype]
    _run([sys.executable, *map(str, words)], file.parent)


def _ask(script: str, file: Path, count: int, *words: str) -> Any:
    engine = HOME / script  # node looks for packages beside the script
    shutil.copyfile(Path(__file__).with_name(script), engine)
    return json.loads(_run(["node", str(engine), str(file), str(count), *words], HOME).splitlines()[-1])


def _run(command: list[str], folder: Path) -> str:
    # The tests' own modules, among them a package of the converter's, are not for it.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotServedError((done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1])
    return done.stdout
