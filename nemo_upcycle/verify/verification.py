"""How equal are a dense model and the MoE model that was made from it? Asked of two Hugging Face folders.

Twice: of the weights, matrix by matrix and streamed, which tells what was done to them; and of the logits on real
text, in float32 with Hugging Face's own implementations, which tells whether the two compute the same function. Where
granularity cut the networks, also of the routing in the MoE model's own type (`routing.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import targets
from nemo_upcycle.models.hf_model import errors_only, load_model, load_tokenizer
from nemo_upcycle.models.mapping import extra_params, mapping_of
from nemo_upcycle.sources import open_dense
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.progress import ProgressLine
from nemo_upcycle.verify.logits import LogitComparison, compare_logits
from nemo_upcycle.verify.routing import TornTokens, count_torn_tokens, router_logits
from nemo_upcycle.verify.weights import WeightGroup, compare_weights


#: Largest difference of logits, over the largest logit, that rounding makes of two float32 implementations.
TOLERANCE = 1e-4
WINDOWS, WINDOW_TOKENS = 2, 256
SAMPLE_TEXT = """\
The lighthouse keeper wrote one line into the log every evening, whether anything had happened or not. Most evenings
nothing had. The lamp was lit at dusk, the wind stood in the north-west, two fishing boats passed inside the reef. He
had kept the habit for thirty-one years, and in that time the book had been replaced eleven times; the old volumes
stood on a shelf above the stove, their spines bleached by salt and steam.

To cook lentils for four people, wash 300 g of them under cold water until it runs clear. Chop an onion, two carrots
and a stick of celery, and fry them slowly in olive oil for ten minutes. Add the lentils, a bay leaf and 900 ml of
stock, and let everything simmer for 25 minutes. Salt goes in at the end, because it keeps the skins hard.

In 1854 a doctor in London drew the deaths of an epidemic on a map of Soho and saw that they lay around one pump. The
handle was taken off, and the cases became fewer; how much of that was due to the handle is still argued about. What
remains is the method: put each observation in its place, and look where they gather.

def mean(values):
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

If a train leaves at 9:40 and needs 2 hours and 35 minutes, it arrives at 12:15. If it is eight minutes late, the
connection at 12:20 is missed, and the next one leaves an hour later. "We will wait," she said, "there is a bench,
there is a bakery, and nobody expects us before the evening." He put the suitcase down and counted their coins.
"""


@dataclass(frozen=True)
class Verification:
    """What `verify` found; `equal` is by the logits in float32 where they were compared, else by the weights.

    Torn tokens do not change it: they depend on the type in which a server routes, not on the weights.
    """

    dense: Path
    moe: Path
    hf_class: str
    equal: bool
    tolerance: float
    weights: tuple[WeightGroup, ...]
    weights_exact: bool
    weights_rounded: tuple[str, ...]
    granularity: int
    logits: LogitComparison | None
    torn: TornTokens | None


def check_tolerance(tolerance: float) -> None:
    """Check a tolerance, before anything is fetched for it.

    Raises:
        SpecError: it is no number, 0 or more.
    """
    if not 0 <= tolerance < math.inf:
        raise SpecError(field="tolerance", got=tolerance, expected="a number, 0 or more", fix="use the default, 1e-4")


def verify(
    dense: Path,
    moe: Path,
    text_file: Path | None = None,
    *,
    layers: bool = False,
    logits: bool = True,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compare a dense Hugging Face folder with the MoE folder made from it.

    Args:
        dense: the parent, with its tokenizer.
        moe: of a class in `models/families`.
        text_file: UTF-8 text to run on; a short one of the package's when None.
        layers: whether to compare what every layer hands on, to find where the models part.
        logits: whether to load and run the models, one after the other, in float32, and a granular one in its own type
            as well; else only weights are compared.
        tolerance: largest difference of logits over the largest logit, to count as equal.

    Raises:
        CheckpointError: a folder is damaged, holds NaN or infinity, or the MoE model is of another parent.
        SpecError: the tolerance is no number, 0 or more.
        UpcycleError: a model does not fit into memory, there is no tokenizer, or no text.

    Example:
        >>> verify(Path("models/Llama-3-8B"), Path("models/Llama-3-8B-E8T2")).equal  # doctest: +SKIP
        True
    """
    check_tolerance(tolerance)
    with open_dense(dense) as parent, SafetensorsFolder(moe) as child:
        hf_class = child.architecture.hf_class
        if not child.architecture.num_experts:
            raise CheckpointError(
                str(moe),
                got=hf_class,
                expected=f"an MoE model ({', '.join(family.hf_class for family in targets())})",
                fix="give the dense folder first, then the MoE's",
            )
        if logits:
            _require_memory((child.architecture.total_params + extra_params(child.architecture)) * 4)
        tokens_BS = _tokens(dense, text_file) if logits else None  # a wrong text shows before the long work
        weights = compare_weights(parent, child)
        own_type, moe_arch = child.dtype(mapping_of("embedding", child.architecture).hf[0]), child.architecture
    found = torn = None
    if tokens_BS is not None:
        found = _compare_logits(dense, moe, tokens_BS, layers)
        if weights.granularity > 1:
            torn = _count_torn(moe, moe_arch, tokens_BS, own_type, weights.granularity)
    equal = found.relative <= tolerance if found else weights.exact and not weights.rounded
    return Verification(dense, moe, hf_class, equal, tolerance, *weights, found, torn)


def _require_memory(needed_bytes: int) -> None:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    free_bytes = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), needed_bytes)
    if free_bytes < needed_bytes:
        raise UpcycleError(
            "memory for the MoE model in float32",
            got=f"{free_bytes / 2**30:.1f} GiB",
            expected=f"{needed_bytes / 2**30:.1f} GiB",
            fix="use a larger machine, or compare the weights alone (--weights-only)",
        )


def _tokens(dense: Path, text_file: Path | None) -> torch.Tensor:
    """Return token ids of the text, [B, S]."""
    try:
        text = text_file.read_text(encoding="utf-8") if text_file else SAMPLE_TEXT
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(
            str(text_file), got=getattr(error, "strerror", None) or error, expected="UTF-8 text", fix="check the file"
        ) from None
    try:
        with errors_only():
            tokenizer = load_tokenizer(dense)
    except Exception as error:  # a damaged file makes the tokenizers library raise just that
        raise UpcycleError(
            f"{dense}: tokenizer",
            got="none" if isinstance(error, OSError | ValueError | KeyError) else f"a damaged one ({error})",
            expected="tokenizer files",
            fix="copy the model's tokenizer files there, or compare the weights alone (--weights-only)",
        ) from None
    ids = torch.tensor(tokenizer(text)["input_ids"][: WINDOWS * WINDOW_TOKENS])
    length = min(WINDOW_TOKENS, len(ids))
    if length < 2:
        raise UpcycleError(str(text_file), got=f"{length} tokens", expected="some words", fix="choose another text")
    return ids[: len(ids) // length * length].view(-1, length)


def _compare_logits(dense: Path, moe: Path, tokens_BS: torch.Tensor, layers: bool) -> LogitComparison:
    with ProgressLine("verify", 2) as line:
        parent = _run(dense, tokens_BS, torch.float32, output_hidden_states=layers)
        line.advance(note="dense model")
        child = _run(moe, tokens_BS, torch.float32, output_hidden_states=layers)
        line.advance(note="MoE model")
    for folder, model in ((dense, parent), (moe, child)):
        if not model.logits.isfinite().all():
            raise CheckpointError(
                f"{folder}: logits",
                got="NaN or infinity",
                expected="finite ones",
                fix="check its config.json: the weights themselves are finite",
            )
    outputs = (parent.hidden_states, child.hidden_states) if layers else ()
    return compare_logits(parent.logits, child.logits, *outputs)


@torch.no_grad()
def _count_torn(
    folder: Path, moe_arch: Architecture, tokens_BS: torch.Tensor, dtype: torch.dtype, granularity: int
) -> TornTokens:
    with errors_only():
        model = load_model(folder, dtype=dtype).eval()
    with router_logits(model, moe_arch) as logits:
        model(tokens_BS, use_cache=False)
    return count_torn_tokens(logits, granularity, moe_arch.top_k or 1, moe_arch.router_kind, dtype)


@torch.no_grad()
def _run(folder: Path, tokens_BS: torch.Tensor, dtype: torch.dtype, **outputs: bool) -> Any:
    """Return a model's logits [B, S, V] and the other outputs asked for, with weights and activations of a type."""
    with errors_only():
        return load_model(folder, dtype=dtype).eval()(tokens_BS, use_cache=False, **outputs)
