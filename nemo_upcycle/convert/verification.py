"""Compare a dense model with the MoE model that was made from it, from their two Hugging Face folders.

Weights are compared matrix by matrix, which shows how upcycling changed the weights. Logits are compared on real
text, in float32 with Hugging Face's own implementations, which shows whether both models compute the same function. If
experts share a router row, the routing is also compared in the MoE model's own type, because in 16 bits top-k may
choose only some of the experts that share a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, one_hot

from nemo_upcycle.convert.compared_logits import TOLERANCE, LogitComparison, compare_logits
from nemo_upcycle.convert.compared_weights import WeightGroup, compare_weights
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import targets
from nemo_upcycle.models.hf_model import errors_only, load_model, load_tokenizer
from nemo_upcycle.models.mapping import extra_params, mapping_of
from nemo_upcycle.models.tokenizer_files import check_tokenizer
from nemo_upcycle.sources.resolve import open_dense
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.dtypes import dtype_name
from nemo_upcycle.utils.memory import free_memory_bytes
from nemo_upcycle.utils.progress import ProgressLine


WINDOWS, WINDOW_TOKENS = 2, 256
#: The package's own sample text: a few paragraphs of several kinds.
_SAMPLE = Path(__file__).with_name("sample.txt")


@dataclass(frozen=True)
class TornTokens:
    """The number of tokens that get parts of networks instead of whole networks, for one type of the model.

    Args:
        dtype: type of the model.
        tokens: number of tokens that were routed.
        torn: number of tokens that got parts of networks.
        share: torn / tokens.
    """

    dtype: str
    tokens: int
    torn: int
    share: float


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. The float32 logits decide `equal`. Without logits, the weights decide `equal`.

    Torn tokens do not change `equal`, because they depend on the type in which a server routes, not on the weights.
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


def verify(
    dense: Path,
    moe: Path,
    *,
    layers: bool = False,
    logits: bool = True,
    expert_utility: Path | None = None,
) -> Verification:
    """Compare a dense Hugging Face folder with the MoE folder made from it.

    Args:
        dense: folder of the parent, with its tokenizer.
        moe: folder of the MoE model, whose class is in `models/families`.
        layers: whether to compare the outputs of every layer, to find where the models diverge.
        logits: whether to run the models and compare their logits; if False, only weights are compared. The models run
            one after the other in float32. If experts share router rows, the MoE model also runs in its own type.
        expert_utility: for a parent with experts, the file that gives some experts more copies; None if all experts
            have equally many copies.

    Raises:
        CheckpointError: a folder is damaged, holds NaN or infinity, or the MoE model is from another parent.
        UpcycleError: a model does not fit into memory, or a tokenizer is missing or damaged.

    Example:
        >>> verify(Path("models/Llama-3-8B"), Path("models/Llama-3-8B-E8T2")).equal  # doctest: +SKIP
        True
    """
    with open_dense(dense) as parent, SafetensorsFolder(moe) as child:
        hf_class = child.architecture.hf_class
        if not child.architecture.num_experts:
            raise CheckpointError(
                str(moe),
                kind="state",
                got=f"is a {hf_class}, which has no experts",
                fix=(
                    "give the parent's folder first, then the MoE's "
                    f"({', '.join(family.hf_class for family in targets())})"
                ),
            )
        if logits:
            check_tokenizer(dense)
            check_tokenizer(moe)
            _require_memory((child.architecture.total_params + extra_params(child.architecture)) * 4)
        # tokenize first, so that a wrong tokenizer fails before the long work
        tokens_BS = _tokens(dense, child.architecture) if logits else None
        weights = compare_weights(parent, child, expert_utility)
        own_type, moe_arch = child.dtype(mapping_of("embedding", child.architecture).hf[0]), child.architecture
        experts = parent.architecture.num_experts
    found = torn = None
    if tokens_BS is not None:
        found = _compare_logits(dense, moe, tokens_BS, layers)
        network_E = [n % experts if experts else n // weights.granularity for n in range(moe_arch.num_experts or 0)]
        if weights.granularity > 1 or (experts and weights.exact):
            torn = _count_torn(moe, moe_arch, tokens_BS, own_type, network_E)
    equal = found.relative <= TOLERANCE if found else weights.exact and not weights.rounded
    return Verification(dense, moe, hf_class, equal, TOLERANCE, *weights, found, torn)


def _require_memory(needed_bytes: int) -> None:
    free_bytes = free_memory_bytes()
    if free_bytes is not None and free_bytes < needed_bytes:
        raise UpcycleError(
            "This machine",
            kind="state",
            got=(
                f"has {free_bytes / 2**30:.1f} GiB of memory free, and the MoE in float32 needs "
                f"{needed_bytes / 2**30:.1f} GiB"
            ),
            fix="use a larger machine, or compare only the weights (--weights-only)",
        )


def _tokens(dense: Path, moe_arch: Architecture) -> torch.Tensor:
    """Return token ids of the package's sample text, [B, S], in sequences that the MoE model can take."""
    try:
        with errors_only():
            tokenizer = load_tokenizer(dense)
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise UpcycleError(
            f"Folder {dense}",
            kind="missing",
            got="has no tokenizer"
            if isinstance(error, OSError | ValueError | KeyError)
            else f"has a damaged tokenizer ({error})",
            fix="copy the model's tokenizer files there, or compare only the weights (--weights-only)",
        ) from None
    text = _SAMPLE.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"][: WINDOWS * WINDOW_TOKENS])
    length = min(WINDOW_TOKENS, len(ids), moe_arch.max_positions)
    if (largest := int(ids.max())) >= moe_arch.vocab_size:
        raise UpcycleError(
            f"Tokenizer of {dense}",
            kind="state",
            got=f"makes token {largest}, but the model has only {moe_arch.vocab_size} tokens",
            fix="copy the model's own tokenizer files there, or compare only the weights (--weights-only)",
        )
    return ids[: len(ids) // length * length].view(-1, length)


def _compare_logits(dense: Path, moe: Path, tokens_BS: torch.Tensor, layers: bool) -> LogitComparison:
    with ProgressLine("verify", 2) as line:
        parent = _run(dense, tokens_BS, layers)
        line.advance(note="parent")
        child = _run(moe, tokens_BS, layers)
        line.advance(note="MoE model")
    for folder, model in ((dense, parent), (moe, child)):
        if not model.logits.isfinite().all():
            raise CheckpointError(
                f"Logits of {folder}",
                kind="state",
                got="have NaN or infinity, although its weights are finite",
                fix="check its config.json",
            )
    outputs = (parent.hidden_states, child.hidden_states) if layers else ()
    return compare_logits(parent.logits, child.logits, *outputs)


@torch.no_grad()
def _count_torn(
    folder: Path, moe_arch: Architecture, tokens_BS: torch.Tensor, dtype: torch.dtype, network_E: list[int]
) -> TornTokens:
    """Count the tokens for which transformers' top-k chooses only a part of a network in at least one layer.

    Args:
        folder: folder of the MoE model.
        moe_arch: architecture of the MoE model.
        tokens_BS: token ids to run the model on.
        dtype: type to run the model in.
        network_E: for each expert, number of the network that it is a part of, or of the parent's expert that it
            copies.
    """
    top_k = moe_arch.top_k or 1
    whole = min(top_k, network_E.count(0))
    with errors_only():
        model = load_model(folder, dtype=dtype).eval()
    with _router_logits(model, moe_arch) as router_logits:
        model(tokens_BS, use_cache=False)
    torn_layers = []
    for logits_TE in router_logits:
        chosen_Tk = moe_arch.router_kind.scores(logits_TE.float()).topk(top_k).indices
        taken_TC = one_hot(torch.tensor(network_E)[chosen_Tk], 1 + max(network_E)).sum(1)
        torn_layers.append(((taken_TC > 0) & (taken_TC < whole)).any(-1))
    torn_T = torch.stack(torn_layers).any(0)
    torn = int(torn_T.sum())
    return TornTokens(dtype_name(dtype), len(torn_T), torn, torn / len(torn_T))


@torch.no_grad()
def _run(folder: Path, tokens_BS: torch.Tensor, layers: bool) -> Any:
    """Run a model in float32. Return its logits [B, S, V] and, if requested, the outputs of its layers."""
    with errors_only():
        model = load_model(folder, dtype=torch.float32).eval()
        return model(tokens_BS, use_cache=False, output_hidden_states=layers)


@contextmanager
def _router_logits(model: Any, moe_arch: Architecture) -> Iterator[list[torch.Tensor]]:
    """Collect the router logits of a Hugging Face model for each token, [T, E] for every MoE layer.

    Args:
        model: model whose router logits are collected inside the context.
        moe_arch: architecture of the model. The router's kind decides whether it computes in float32 or in the model's
            type.
    """
    (weight,) = mapping_of("router", moe_arch).hf
    collected: list[torch.Tensor] = []

    def collect(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        tokens_TD, weight_ED = args[0].flatten(0, -2), module.weight
        if moe_arch.router_kind.in_float32:
            tokens_TD, weight_ED = tokens_TD.float(), weight_ED.float()
        collected.append(linear(tokens_TD, weight_ED))

    layers = [layer for layer in range(moe_arch.num_layers) if moe_arch.is_moe_layer(layer)]
    named = dict(model.named_modules())
    routers = [weight.format(layer=layer).removesuffix(".weight") for layer in layers]
    if not named.keys() >= set(routers):  # transformers 5 has one name for the MoE block of every class
        routers = [name.replace(".block_sparse_moe.", ".mlp.") for name in routers]
    hooks = [named[name].register_forward_pre_hook(collect) for name in routers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
