"""The text that a calibration runs on: windows of a finished blend, or a user's prompts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from nemo_upcycle.calibration.collect import Sample
from nemo_upcycle.data.finished import MANIFEST, FinishedBlend, open_blend
from nemo_upcycle.data.indexed_dataset import read_tokens
from nemo_upcycle.data.tokenizers import open_tokenizer
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.init.rng import block_generator
from nemo_upcycle.spec import ROUTER_INITS, UpcycleSpec
from nemo_upcycle.utils.conf import read_yaml
from nemo_upcycle.utils.files import sha256_file


#: Tokens of a calibration, and of each of its windows: the longest context that a token of it is seen in.
TOKENS, WINDOW_TOKENS = 16384, 512


def calibration_sample(spec: UpcycleSpec, dense: Path, data: Path | None, tokens: int = TOKENS) -> Sample:
    """Return what a spec's calibration runs on.

    Args:
        spec: whose routers are made of prompts, or of a blend.
        dense: folder of the dense model, whose tokenizer reads the prompts.
        data: a finished folder of `nemo-upcycle data`; prompts need none.
        tokens: of a blend.

    Raises:
        SpecError: the blend has not a source for each copy, where routers tell its sources apart.
        UpcycleError: there is no blend, one of another tokenizer, or none with enough text, or no prompts.
    """
    if ROUTER_INITS[spec.router_init].texts == "prompts":
        return prompts_sample(Path(spec.router_prompts).expanduser(), dense, spec.copies)
    if data is None:
        fix = "name a finished folder of nemo-upcycle data"
        raise UpcycleError(field="data", got="none", expected="the text to run the dense model on", fix=fix)
    blend = open_blend(data)
    blend.require_tokenizer_of(str(dense))
    return blend_sample(blend, spec, tokens)


def blend_sample(blend: FinishedBlend, spec: UpcycleSpec, tokens: int = TOKENS) -> Sample:
    """Return windows of a blend's training text, each a batch; the same seed gives the same ones.

    Sources have windows by their shares; as many each where routers tell them apart.

    Args:
        blend: the finished blend.
        spec: as in `calibration_sample`.
        tokens: as many, or all there are.

    Raises:
        SpecError, UpcycleError: as in `calibration_sample`.
    """
    sources = list(blend.tokens["train"])
    told_apart = ROUTER_INITS[spec.router_init].texts == "sources"
    if told_apart and len(sources) != spec.copies:
        raise SpecError(
            field="router_init",
            got=f"{spec.router_init}, with {spec.copies} copies",
            expected=f"as many as blend {blend.name} has sources: {len(sources)} ({', '.join(sources)})",
            fix=f"set <num_experts>={len(sources) * spec.granularity}, or give another blend",
        )
    count = tokens // WINDOW_TOKENS
    shares = dict.fromkeys(sources, 1 / len(sources)) if told_apart else blend.shares
    wanted = {source: int(shares[source] * count) for source in sources}
    left = 0 if told_apart else count - sum(wanted.values())
    for source in sorted(sources, key=lambda source: wanted[source] - shares[source] * count)[:left]:
        wanted[source] += 1
    batches, labels, taken = list[torch.Tensor](), list[int](), dict[str, int]()
    for label, source in enumerate(sources):
        windows = [
            (prefix, start)
            for prefix, length in sorted(blend.tokens["train"][source].items())
            for start in range(0, length - WINDOW_TOKENS + 1, WINDOW_TOKENS)
        ]
        order = torch.randperm(len(windows), generator=block_generator(spec.seed, "calibration", source))
        chosen = [windows[number] for number in sorted(order[: wanted[source]].tolist())]
        batches += [_window(blend.folder / prefix, start) for prefix, start in chosen]
        labels += [label] * len(chosen)
        taken[source] = len(chosen)
    if empty := [source for source, windows in taken.items() if not windows and (told_apart or not batches)]:
        raise UpcycleError(
            f"source {empty[0]} of {blend.folder}",
            got="no window of text",
            expected=f"{WINDOW_TOKENS} tokens in a row, of {tokens} or more in all",
            fix="give a blend with more text, or more tokens",
        )
    about = {
        "blend": blend.name,
        "folder": str(blend.folder),
        "manifest_sha256": sha256_file(blend.folder / MANIFEST),
        "windows": taken,
        "window_tokens": WINDOW_TOKENS,
    }
    return Sample(tuple(batches), tuple(labels), about | {"sha256": _digest(batches)})


def prompts_sample(file: Path, dense: Path, copies: int) -> Sample:
    """Return the texts of a YAML file, a list with a text or a list of texts for each copy; each is a batch.

    Args:
        file: the YAML file.
        dense: folder of the dense model, for its tokenizer.
        copies: how many there have to be.

    Raises:
        UpcycleError: the file is not such a list.
    """
    given = read_yaml(file, "prompts in")
    texts = [[entry] if isinstance(entry, str) else entry for entry in given] if isinstance(given, list) else []
    is_list = all(
        isinstance(entry, list) and entry and all(isinstance(text, str) for text in entry) for entry in texts
    )
    if len(texts) != copies or not is_list:
        got = f"a list of {len(texts)}" if texts and is_list else "something else"
        expected = f"a list of {copies}, a text or a list of texts for each copy"
        raise UpcycleError(f"prompts in {file}", got=got, expected=expected, fix="write an entry for each: - [TEXT]")
    tokenizer = open_tokenizer(dense)
    batches, labels = list[torch.Tensor](), list[int]()
    for label, entry in enumerate(texts):
        for text in entry:
            ids = tokenizer(text)["input_ids"][:WINDOW_TOKENS]
            if not ids:
                raise UpcycleError(f"prompts in {file}", got="an empty text", expected="words", fix="write some")
            batches.append(torch.tensor([ids]))
            labels.append(label)
    return Sample(tuple(batches), tuple(labels), {"prompts": str(file.absolute()), "sha256": _digest(batches)})


def _window(prefix: Path, start: int) -> torch.Tensor:
    return torch.from_numpy(read_tokens(prefix, start, WINDOW_TOKENS)).view(1, -1)


def _digest(batches: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{tuple(batch.shape)}".encode() + batch.numpy().tobytes())
    return digest.hexdigest()
