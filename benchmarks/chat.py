"""A tuned model chats in llama.cpp, by the chat template that its GGUF carries: what it is given, and what it answers.

    scripts/llama_cpp.sh
    nemo upcycle pipeline --factory smollm2_135m_e8t2_sft dir=runs/demo-smollm2_135m_e8t2_sft --until export --yes
    python -m benchmarks.chat runs/demo-smollm2_135m_e8t2_sft > benchmarks/results/chat.md

Asks the dense parent and the tuned MoE the same questions, greedily, in bfloat16. Ends with an error where the tokens
of a prompt are not those that transformers makes of the same messages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from nemo_upcycle.data.tokenizers import open_tokenizer
from tests.servers.llama_cpp import chat, to_gguf


QUESTIONS = ("What is a computer?", "Who invented it?", "What is the capital of France?")
#: Tokens of an answer, at most.
COUNT = 64


def main() -> None:
    """Write the transcript, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of the pipeline that tunes, with its export")
    run = parser.parse_args().run
    sys.stdout.write("# What a tuned model answers\n\n")
    sys.stdout.write(f"`python -m benchmarks.chat {run}`, greedy, bfloat16, {COUNT} tokens an answer at most.\n")
    for title, folder in (("dense parent", run / "dense"), ("MoE, tuned", run / "hf")):
        turns = _turns(folder)
        sys.stdout.write(f"\n## {title}\n\n")
        prompt = open_tokenizer(folder).decode(turns[-1]["prompt"])
        for turn in turns:
            end = "" if turn["ended"] else " [...]"
            sys.stdout.write(f"> **{turn['question']}** ({len(turn['prompt'])} tokens of prompt)\n>\n")
            sys.stdout.writelines(f"> {line}\n" for line in f"{turn['text']}{end}".splitlines() or [""])
            sys.stdout.write("\n")
    sys.stdout.write(f"The last prompt, whose tokens are those of transformers:\n\n```\n{prompt}\n```\n")


def _turns(folder: Path) -> list[dict[str, Any]]:
    """Let a model answer the questions, each with all before it.

    Raises:
        SystemExit: llama.cpp gives the model another prompt than transformers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        to_gguf(folder, file := Path(scratch) / "model.gguf", "bf16")
        turns = chat(file, COUNT, QUESTIONS)
    tokenizer, messages = open_tokenizer(folder), list[dict[str, str]]()
    for turn in turns:
        messages.append({"role": "user", "content": turn["question"]})
        if turn["prompt"] != (
            wanted := tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ):
            sys.exit(f"other tokens in llama.cpp: {tokenizer.decode(turn['prompt'])!r}, {tokenizer.decode(wanted)!r}")
        messages.append({"role": "assistant", "content": turn["text"]})
    return turns


if __name__ == "__main__":
    main()
