"""The models that every server is asked to serve: parents, the specs for their MoEs, and the expected tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.hf_model import load_model
from nemo_upcycle.utils.files import read_json
from tests.unit.online.samples import calibrated


TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
COUNT = 12  # tokens after a prompt
FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}
SIGMOID = {"router_score": "sigmoid", "routed_scaling_factor": 2.5}
#: Name of a spec -> fields of the `UpcycleSpec`.
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "granular": FINE,
    "shared": FINE | {"shared_experts": 1},
    "every second layer": {"moe_layers": "every-2"},
    "softmax first": {"router_order": "softmax_topk", "router_init": "zero"},
    "softmax first, shared": {"router_order": "softmax_topk", "router_init": "zero", "shared_experts": 1},
    "sigmoid": FINE | SIGMOID | {"moe_layers": "1"},
    "sigmoid, shared": FINE | SIGMOID | {"shared_experts": 1, "moe_layers": "1"},
    "from data": FINE | {"router_init": "prompts"},
    "sigmoid, from data": SIGMOID | {"router_init": "prompts", "moe_layers": "1"},
}
#: Specs whose routers choose among parts of networks. In 16 bits, top-k may mix two networks: see docs/classes.md.
MIXED_IN_16_BITS = ("granular", "from data")
#: Parent, and whether its embeddings are tied -> names of specs.
MODELS = {
    ("Llama", False): ["plain", "sigmoid, shared"],
    ("Llama", True): [
        *("plain", "granular", "shared", "every second layer", "softmax first", "softmax first, shared", "from data"),
    ],
    ("Qwen2", True): ["plain", "softmax first"],
    ("Qwen3", False): ["plain", "every second layer", "softmax first"],
    ("Qwen3", True): ["granular", "sigmoid", "sigmoid, shared", "from data", "sigmoid, from data"],
    ("OLMo 2", False): ["plain", "softmax first"],
    ("Granite 3", True): ["plain", "shared"],
    ("Granite 4", True): ["plain"],
}
CASES = [(*parent, name) for parent, names in MODELS.items() for name in names]


def spec_of(name: str, dense: Path, folder: Path) -> UpcycleSpec:
    """Return a spec; if it needs a calibration file, make the file in a folder."""
    fields = SPECS[name]
    if fields.get("router_init") == "prompts":
        drawn = {field: value for field, value in fields.items() if field != "router_init"}
        return calibrated(dense, folder / "calibration.safetensors", **drawn)
    return UpcycleSpec(**fields)


@torch.no_grad()
def continuation(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """Return the likeliest tokens after a prompt, and their smallest lead over a rival.

    Returns:
        The tokens, and the smallest lead of a token over the second-best token, in standard deviations of the logits.
    """
    tokens, lead = list(prompt), float("inf")
    for _ in range(COUNT):
        logits_V = model(torch.tensor([tokens])).logits[0, -1]
        best, rival = logits_V.topk(2).values
        lead = min(lead, float((best - rival) / logits_V.std()))
        tokens.append(int(logits_V.argmax()))
    return tokens[len(prompt) :], lead


def clear_prompt(folder: Path) -> tuple[list[int], list[int]]:
    """Return a random prompt and its continuation by transformers in float32.

    Of 300 prompts, keep those whose continuation cannot change by rounding to 16 bits. Then take the prompt with the
    most different tokens, because small random models tend to repeat themselves.
    """
    draw, model = random.Random(0), load_model(folder, dtype=torch.float32).eval()
    prompts = [[draw.randrange(3, 200) for _ in range(5)] for _ in range(300)]
    found = [(prompt, *continuation(model, prompt)) for prompt in prompts]
    prompt, tokens, _ = max((one for one in found if one[2] > 0.1), key=lambda one: len(set(one[1])))
    return prompt, tokens


def save_qwen3_processor(folder: Path) -> list[int]:
    """Write a tokenizer and a picture processor for the random Qwen3-VL of `tests.parents`.

    Args:
        folder: folder of the model, whose token 249 stands for a piece of a picture.

    Returns:
        Token ids of a text with one picture.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    path = folder / "config.json"
    config = read_json(path) | {"video_token_id": 246, "vision_end_token_id": 247}
    path.write_text(json.dumps(config), encoding="utf-8")
    own = {0: "<unk>", 2: "<|im_end|>"}
    own |= {246: "<|video_pad|>", 247: "<|vision_end|>", 248: "<|vision_start|>", 249: "<|image_pad|>"}
    names = {own.get(number, f"w{number}"): number for number in range(config["text_config"]["vocab_size"])}
    words = Tokenizer(models.WordLevel(names, unk_token=own[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=own[0], eos_token=own[2], additional_special_tokens=list(own.values())[2:]
    )
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    patches["size"] = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}  # pixels
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
    return [5, 248, 249, 247, 17, 44, 101, 77]
