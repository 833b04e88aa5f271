"""One pass of a dense parent over packs of conversations: what it answers, kept for a training to learn from.

The packs are taken in parts. The layers take turns on all conversations of a part, so that neither the model nor what
its layers hand on is in memory whole; a stopped pass goes on with the part that it had come to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_upcycle.calibration.streaming import StreamedModel, check_streamed, several_at_a_time
from nemo_upcycle.calibration.teacher import FORMAT, MADE_BY, TOP_K, Teacher, pack_key, part_name
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.package_info import __version__
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.calibrated import parent_digest
from nemo_upcycle.utils.files import MARKER, is_complete, marker_of, output_folder, read_json, whole_file, write_json
from nemo_upcycle.utils.progress import ProgressLine


#: Tokens of a part, of a batch, and what the lengths of conversations are rounded up to: the causal mask and the
#: rotary embedding are kept for each length. Rows of logits at a time.
_PART_TOKENS, _BATCH_TOKENS, _ROUND_TO, _LOGIT_ROWS = 65_536, 4096, 64, 256


@dataclass(frozen=True)
class Pack:
    """A pack that the parent answers.

    Args:
        labels: [S], as the data module gives them to the loss.
        sequences: conversations of the pack, one after the other: the tokens that the model is given, and a mask of
            those whose next token is in the loss.
    """

    labels: torch.Tensor
    sequences: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def tokens(self) -> int:
        """How many tokens the model is given."""
        return sum(len(ids) for ids, _ in self.sequences)

    @property
    def places(self) -> torch.Tensor:
        """Places of the pack that the loss is on."""
        return torch.cat([is_scored for _, is_scored in self.sequences]).nonzero()[:, 0]


@dataclass(frozen=True)
class TeacherReport:
    """What `teach` did.

    Attributes:
        path: the folder of the answers.
        made: whether it was made now; False if it was already finished.
        packs: number of packs that the parent answered.
        answer_tokens: number of places that it answered at.
        top_k: number of tokens kept at each place.
        covered: mean share of the probability that the kept tokens have.
        size_bytes: size of the folder.
        seconds: time that the answers took.
    """

    path: Path
    made: bool
    packs: int
    answer_tokens: int
    top_k: int
    covered: float
    size_bytes: int
    seconds: float = 0.0


def teach(
    dense: DenseSource,
    output: Path,
    packs: Sequence[Pack],
    about: dict[str, Any],
    *,
    threads: int | None = None,
    device: torch.device | None = None,
) -> TeacherReport:
    """Write what a dense model answers in packs of conversations; a finished folder of the same is kept.

    Args:
        dense: the open dense model, whose folder has a `config.json`; of several, the first is asked.
        output: the folder to make.
        packs: all that will be trained on.
        about: where they are from, as plain values: what the lineage says.
        threads: batches at a time; None: as many as torch has threads. With a GPU one.
        device: where layers compute, in float32; None: a GPU where there is one.

    Raises:
        CheckpointError: the dense model cannot be run layer by layer, or the packs are of another tokenizer.
        UpcycleError: something else is in the folder's place.

    Example:
        >>> with open_dense("models/Llama-3-8B-Instruct") as dense:  # doctest: +SKIP
        ...     teach(dense, Path("data/mine/teacher"), packs_of(open_chat("data/mine")), {})
    """
    start_s, arch = time.monotonic(), dense.architecture
    fix = "give conversations that were packed with the tokenizer of this model"
    check_streamed(dense, (ids for pack in packs for ids, _ in pack.sequences), "packs", fix)
    top_k = min(TOP_K, arch.vocab_size - 1)
    made_from = {
        "format": FORMAT,
        "parent": {"path": str(dense.branches()[0].path.resolve()), "sha256": parent_digest(dense)},
        "data": about,
        "top_k": top_k,
        "part_tokens": _PART_TOKENS,
    }
    if is_complete(output):
        if read_json(marker_of(output)).get("made_from") == made_from:
            return _report(output, made=False, seconds=0.0)
        fix = "choose another folder, or remove it first"
        raise UpcycleError(str(output), got="answers of other packs or models", expected="no such folder", fix=fix)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = list(_parts(packs))
    with output_folder(output, MADE_BY, plan=made_from) as folder:
        missing = [number for number in range(len(parts)) if not (folder / part_name(number)).is_file()]
        padded = sum(batch.ids.numel() for number in missing for batch in _batches(parts[number]))
        work, threads = padded * (arch.num_layers + 1), threads if device.type == "cpu" else 1
        model = StreamedModel(dense.branches()[0], device)
        with several_at_a_time(threads) as run, ProgressLine("teach", work) as line:
            for number in missing:
                tensors = _answered(model, parts[number], top_k, run, line)
                with whole_file(folder / part_name(number)) as aside:
                    save_file(tensors, aside)
        facts = {"parts": len(parts), "packs": len(packs), **_facts(folder, len(parts)), "version": __version__}
        write_json(folder / MARKER, {"made_by": MADE_BY, "made_from": made_from, **facts})
    return _report(output, made=True, seconds=time.monotonic() - start_s)


def _parts(packs: Sequence[Pack]) -> Iterator[list[Pack]]:
    """Yield consecutive packs, as many as have the tokens of a part."""
    part, tokens = list[Pack](), 0
    for pack in packs:
        part.append(pack)
        tokens += pack.tokens
        if tokens >= _PART_TOKENS:
            yield part
            part, tokens = [], 0
    if part:
        yield part


@dataclass(frozen=True)
class _Batch:
    """Conversations of about one length, [B, S]; causal attention leaves the padding at their ends without effect.

    Args:
        ids: token numbers.
        scored: places in the flat batch of the tokens whose next token is in the loss.
        rows: rows of the part's answers, in the order of `scored`.
    """

    ids: torch.Tensor
    scored: torch.Tensor
    rows: torch.Tensor


def _batches(packs: Sequence[Pack]) -> Iterator[_Batch]:
    """Yield the conversations of packs, those of a length together."""
    by_length: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    row = 0
    for ids, is_scored in (sequence for pack in packs for sequence in pack.sequences):
        scored = is_scored.nonzero()[:, 0]
        length = -(-len(ids) // _ROUND_TO) * _ROUND_TO
        by_length.setdefault(length, []).append((ids, scored, torch.arange(row, row + len(scored))))
        row += len(scored)
    for length, found in sorted(by_length.items()):
        count = max(1, _BATCH_TOKENS // length)
        for first in range(0, len(found), count):
            texts, asked, answers = zip(*found[first : first + count], strict=True)
            padded = torch.stack([torch.nn.functional.pad(text, (0, length - len(text))) for text in texts])
            flat = [number * length + places for number, places in enumerate(asked)]
            yield _Batch(padded, torch.cat(flat), torch.cat(answers))


def _answered(
    model: StreamedModel,
    packs: Sequence[Pack],
    top_k: int,
    run: Callable[[Callable[[Any], Any], Sequence[Any]], Any],
    line: ProgressLine,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a part's file."""
    batches, places = list(_batches(packs)), [pack.places for pack in packs]
    states, calls = model.embedded([batch.ids for batch in batches])
    for layer in range(len(model.layers)):
        module = model.filled(layer)

        def computed(state_BSD: torch.Tensor, module: Any = module, layer: int = layer) -> torch.Tensor:
            call = calls[tuple(state_BSD.shape[:2])][layer]
            out = module(state_BSD.to(model.device), *call["args"], **call["kwargs"])
            handed_on: torch.Tensor = (out[0] if isinstance(out, tuple) else out).cpu()
            return handed_on

        new = list[torch.Tensor]()
        for state in run(computed, states):
            new.append(state)
            line.advance(state.shape[0] * state.shape[1], note=f"layer {layer}")
        states = new
        module.to("meta")
    output, count = model.filled_output(), sum(map(len, places))
    tokens, log_probs = torch.empty(count, top_k, dtype=torch.int32), torch.empty(count, top_k + 1)

    def answered(pair: tuple[_Batch, torch.Tensor]) -> None:
        batch, state_BSD = pair
        chosen = zip(batch.scored.split(_LOGIT_ROWS), batch.rows.split(_LOGIT_ROWS), strict=True)
        for scored, rows in chosen:
            logits_NV = output(state_BSD.flatten(0, 1)[scored].to(model.device)).log_softmax(-1)
            top = logits_NV.topk(top_k, sorted=True)
            others = logits_NV.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
            tokens[rows] = top.indices.to("cpu", torch.int32)
            log_probs[rows] = torch.cat([top.values, others], -1).cpu()

    for batch, _ in zip(batches, run(answered, list(zip(batches, states, strict=True))), strict=True):
        line.advance(batch.ids.numel(), note="answers")
    model.give_up_output()
    keys = b"".join(pack_key(pack.labels) for pack in packs)
    return {
        "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(packs), -1),
        "counts": torch.tensor([len(one) for one in places]),
        "places": torch.cat(places).to(torch.int32),
        "tokens": tokens,
        "log_probs": log_probs,
    }


def _facts(folder: Path, parts: int) -> dict[str, Any]:
    """Return how many answers the parts of a folder have, and what share of the probability is kept."""
    covered, count = 0.0, 0
    for number in range(parts):
        with safe_open(folder / part_name(number), "pt") as file:
            others_N = file.get_tensor("log_probs")[:, -1].double().exp()
        covered, count = covered + float((1 - others_N).sum()), count + len(others_N)
    return {"answer_tokens": count, "covered": round(covered / max(count, 1), 6)}


def _report(folder: Path, *, made: bool, seconds: float) -> TeacherReport:
    manifest = Teacher(folder).manifest
    return TeacherReport(
        path=folder,
        made=made,
        packs=manifest["packs"],
        answer_tokens=manifest["answer_tokens"],
        top_k=manifest["made_from"]["top_k"],
        covered=manifest["covered"],
        size_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        seconds=round(seconds, 3),
    )
