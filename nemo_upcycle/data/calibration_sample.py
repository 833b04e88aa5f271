"""Read the prompts of each expert copy from a user's file; the router is made from these prompts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from nemo_upcycle.data.tokenizers import open_tokenizer
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.online.calibration import Sample
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.conf import read_yaml


#: Maximum number of tokens in a prompt; no token sees a longer context.
_PROMPT_TOKENS = 512


def calibration_sample(spec: UpcycleSpec, dense: Path) -> Sample:
    """Read the prompts of a spec's YAML file: a text or a list of texts for each copy. Each text becomes a batch.

    Args:
        spec: spec whose router is made from prompts.
        dense: folder of the dense model, for its tokenizer.

    Raises:
        UpcycleError: the file does not contain a text or a list of texts for each copy, or a text is empty.
    """
    file, copies = Path(spec.router_prompts).expanduser(), spec.copies
    given = read_yaml(file, "prompts in")
    texts = [[entry] if isinstance(entry, str) else entry for entry in given] if isinstance(given, list) else []
    is_list = all(
        isinstance(entry, list) and entry and all(isinstance(text, str) for text in entry) for entry in texts
    )
    if len(texts) != copies or not is_list:
        entries = "1 entry" if len(texts) == 1 else f"{len(texts)} entries"
        got = f"has {entries}" if texts and is_list else "is not a list of texts"
        expected = f"the spec makes {copies} copies, each with a text or a list of texts"
        raise UpcycleError(
            f"Prompt file {file}",
            kind="state",
            got=got,
            expected=expected,
            fix="write one entry for each copy: - [TEXT]",
        )
    tokenizer, digest = open_tokenizer(dense), hashlib.sha256()
    batches, labels = list[torch.Tensor](), list[int]()
    for label, entry in enumerate(texts):
        for text in entry:
            ids = tokenizer(text)["input_ids"][:_PROMPT_TOKENS]
            if not ids:
                raise UpcycleError(
                    f"Prompt file {file}", kind="state", got="has an empty text", fix="write words into it"
                )
            batches.append(torch.tensor([ids]))
            labels.append(label)
            digest.update(f"{tuple(batches[-1].shape)}".encode() + batches[-1].numpy().tobytes())
    about = {"prompts": str(file.absolute()), "sha256": digest.hexdigest()}
    return Sample(tuple(batches), tuple(labels), about)
