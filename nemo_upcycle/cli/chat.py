"""`nemo-upcycle chat`: turn conversations into packed sequences for fine-tuning."""

from __future__ import annotations

import argparse
from typing import Any

from nemo_upcycle.cli.common import folder_to_make, require_overrides, show
from nemo_upcycle.data.chat.config import read_chat
from nemo_upcycle.utils.conf import packaged, packaged_names


EPILOG = f"""examples:
  nemo-upcycle chat chatterbot runs/answers tokenizer=asset://smollm2-135m seq_length=512
  nemo-upcycle chat mine.jsonl data/mine tokenizer=/models/Llama-3-8B-Instruct
  nemo-upcycle chat mine.yaml data/mine tokenizer=hf://ORG/NAME seq_length=4096 --strict

Each line of the files is a conversation:
  {{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}
or in ShareGPT's form: {{"conversations": [{{"from": "human", "value": "..."}}, {{"from": "gpt", "value": "..."}}]}}
Tune on the result with nemo llm finetune --factory "RECIPE(data='DIR')".
exit status: 0 done; 1 more wrong lines than max_lost allows; 2 wrong value or file.

The package's own sets are in {packaged("chat")}; messages.yaml explains every key."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    names = ", ".join(packaged_names("chat"))
    parser.add_argument("chat", metavar="CONVERSATIONS", help=f"a .jsonl file, {names}, or a YAML file")
    parser.add_argument("output", metavar="DIR", type=folder_to_make, help="folder to make")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="changed keys of the YAML file")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first wrong line (default: list it and continue)"
    )


def run(args: argparse.Namespace) -> int:
    """Build a set of conversations, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    require_overrides(args)
    chat = read_chat(args.chat, args.overrides)
    from nemo_upcycle.data.chat.build_chat import build_chat

    manifest = build_chat(chat, args.output, strict=args.strict)
    show(args, manifest, _text(manifest, str(args.output)))
    return 0


def _text(manifest: dict[str, Any], folder: str) -> str:
    lines = [f"{folder}: conversations {manifest['chat']}, sequences of {manifest['seq_length']:,} tokens"]
    for split, counts in manifest["splits"].items():
        share = 100 * counts["answer_tokens"] / counts["tokens"]
        line = (
            f"  {split}: {counts['conversations']:,} conversations, {counts['answers']:,} answers,"
            f" {counts['tokens']:,} tokens, {share:.0f} % of them in answers"
        )
        if split in manifest["packing"]:
            line += f"; {counts['packs']:,} packs, {manifest['packing'][split]['packing_efficiency']:g} % full"
        lines.append(line + (f"; {counts['cut']:,} cut" if counts["cut"] else ""))
    lines += [f"  removed: {count:,} lines, {reason}" for reason, count in manifest["removed"].items()]
    if manifest["removed"]:
        lines.append(f"  {folder}/removed.jsonl: file, line and field of each, and what to do")
    return "\n".join(lines)
