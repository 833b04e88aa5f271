"""Checks of a checkpoint before and during use: it has the tensors of its architecture, and they are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.folding import folds
from nemo_upcycle.models.growth import expert_scale
from nemo_upcycle.models.mapping import hf_names, mapping_of
from nemo_upcycle.models.sharding import float32_names, hf_shapes
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.dtypes import dtype_name


#: Block size for comparing two tensors (bytes), and number of rows to compare if many ranks open the checkpoint.
_BLOCK_BYTES, _SAMPLE_ROWS = 32 << 20, 64


class BrokenWeights(CheckpointError):
    """The checkpoint holds invalid numbers, so reading it again cannot help."""


def check_source(dense: DenseSource, *, sampled: bool = False) -> None:
    """Check that a checkpoint holds exactly the tensors of its architecture, in the right shapes.

    Args:
        dense: open checkpoint.
        sampled: whether to compare only some rows of the output layer that a tied model may store. Use this if many
            ranks open one checkpoint. Some rows are enough, because an output layer that was trained separately
            differs in all rows.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape, or would not be used. The last case includes an output
            layer of a tied model that differs from the embedding.
    """
    arch = dense.architecture
    shapes = hf_shapes(arch)
    # Tied models may store the embedding twice. Old checkpoints store rotary frequencies, which follow from the
    # config.
    present = {name for name in dense.names() if not name.endswith("rotary_emb.inv_freq")}
    if family := find_family(arch.hf_class):
        present = {name for name in present if not family.is_mtp(name, arch.num_layers)}
    if arch.tied_embeddings:
        present.discard(mapping_of("output", arch).hf[0])
    fix = "check that config.json and the weights belong together"
    for what, names in (
        ("lacks tensors", shapes.keys() - present),
        (f"has tensors that {arch.hf_class} does not have", present - shapes.keys()),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            got = f"{what}: {', '.join(sorted(names)[:5])}{more}"
            raise CheckpointError(str(dense.path), kind="state", got=got, fix=fix)
    for name, shape in shapes.items():
        if dense.shape(name) != shape:
            raise CheckpointError(
                f"{dense.path}: shape of {name}",
                got=list(dense.shape(name)),
                expected=f"{list(shape)}, as in config.json",
                fix=fix,
            )
    for source in dense.branches():
        if arch.tied_embeddings and mapping_of("output", arch).hf[0] in source.names():
            _check_tied(source, sampled)


def _check_tied(dense: DenseSource, sampled: bool) -> None:
    """Check that the output layer of a tied model equals its embedding.

    If they differ, transformers 4 drops the output layer, and transformers 5 uses it.
    """
    embedding, output = pair = [mapping_of(role, dense.architecture).hf[0] for role in ("embedding", "output")]
    rows, width = dense.shape(embedding)
    dtype = torch.promote_types(dense.dtype(embedding), dense.dtype(output))
    step = -(-rows // _SAMPLE_ROWS) if sampled else max(1, _BLOCK_BYTES // (width * dtype.itemsize))
    same = dense.shape(output) == (rows, width)
    for start in range(0, rows if same else 0, step):
        index = [(start, min(start + (1 if sampled else step), rows)), (0, width)]
        same &= torch.equal(*(dense.read(name, index).to(dtype) for name in pair))
        dense.release()
    if not same:
        raise CheckpointError(
            f"{dense.path}: {output}",
            kind="state",
            got=f"differs from {embedding}, but tie_word_embeddings in config.json is true",
            fix=f"set tie_word_embeddings to false to keep both, or remove {output}",
        )


def require_finite(
    slice_: torch.Tensor, name: str, source: DenseSource | None = None, *, made: torch.Tensor | None = None
) -> None:
    """Check that a slice of a tensor, or the result of its cast, holds no NaN and no infinity.

    Args:
        slice_: slice that was read.
        name: name of the tensor.
        source: checkpoint, for error messages.
        made: result of the cast. If given, this result is checked, and the slice only shows whether the weights or the
            cast are the cause of an invalid value.

    Raises:
        BrokenWeights: a value is NaN or infinite; the message names tensor and source.
    """
    if _is_finite(slice_ if made is None else made):
        return
    if made is not None and _is_finite(slice_):
        require_fits(made, name, source)
    raise BrokenWeights(
        _where(name, source),
        kind="state",
        got=f"has NaN or infinite values ({int((~slice_.isfinite()).sum())})",
        fix="use an earlier checkpoint",
    )


def require_fits(made: torch.Tensor, name: str, source: DenseSource | None = None) -> None:
    """Check that a tensor made from finite weights did not overflow its type.

    Args:
        made: result of a cast or of a change.
        name: name of the tensor that the result comes from.
        source: checkpoint, for error messages.

    Raises:
        BrokenWeights: a value overflowed; the message names tensor and source.
    """
    if not _is_finite(made):
        raise BrokenWeights(
            _where(name, source),
            kind="state",
            got=f"has numbers too large for {dtype_name(made.dtype)}",
            fix="choose bfloat16 or float32",
        )


def _where(name: str, source: DenseSource | None) -> str:
    return f"{source.path}: {name}" if source else name


def _is_finite(tensor: torch.Tensor) -> bool:
    # The sum needs one fast pass. If the sum is not finite, a second pass checks every value, because a sum of finite
    # values can overflow.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def rounded_because(
    dense: DenseSource, dtype: torch.dtype, spec: UpcycleSpec | None = None, *, written: Architecture | None = None
) -> tuple[str, ...]:
    """Return why weights lose digits when they are cast to a type and scaled in it; empty if they lose none.

    Args:
        dense: open checkpoint.
        dtype: type of the result.
        spec: spec with the factors that scale the weights and biases after an expert's activation. A factor that is
            not a power of two rounds the weights, which changes the logits in 16-bit types. A factor below 1 makes the
            smallest numbers of a type lose digits. This matters only in float16, because the numbers are below 1e-38
            in every other type.
        written: architecture of the model whose weights are written into a Hugging Face folder; None if none are.

    Example:
        >>> with open_dense("models/float32") as dense:  # doctest: +SKIP
        ...     rounded_because(dense, torch.bfloat16)
        ('float32 weights are rounded to bfloat16 (model.embed_tokens.weight and 290 more)',)
    """
    arch = dense.architecture
    names = hf_names(arch) if find_family(arch.hf_class) else dense.names()
    weights = rounded({name: dense.dtype(name) for name in names if name not in float32_names(arch)}, dtype)
    return (
        *weights,
        *(_rounded_by(_factors(spec, dense), dtype) if spec else ()),
        *(rounded_by_folding(written, dtype) if written else ()),
    )


def rounded_by_folding(arch: Architecture, dtype: torch.dtype) -> Iterator[str]:
    """Yield a reason for every setting that rounds weights of a Hugging Face folder, because the class lacks it.

    Args:
        arch: architecture of the model.
        dtype: type of the weights.
    """
    for fold in folds(arch):
        where = f"{fold.what} in place of {fold.setting}"
        if fold.offset and torch.finfo(dtype).bits < 32:
            yield f"the {fold.offset:g} added to the {where} is rounded in {dtype_name(dtype)}"
        yield from _rounded_by({where: fold.factor}, dtype)


def _rounded_by(factors: Mapping[str, float], dtype: torch.dtype) -> Iterator[str]:
    """Yield a reason for every factor (name of the scaled weights -> factor) that rounds weights of a type."""
    for what, factor in factors.items():
        if how := _rounding(factor, dtype):
            yield f"the factor {factor:.4g} on the {what} {how}"


def rounded(stored: dict[str, torch.dtype], dtype: torch.dtype) -> Iterator[str]:
    """Yield a reason for every stored type that loses digits in a cast to `dtype`, with the names of the tensors.

    Args:
        stored: name of a tensor -> its type.
        dtype: type of the result.
    """
    lossy: dict[torch.dtype, list[str]] = {}
    for name, own in stored.items():
        if torch.promote_types(own, dtype) != dtype:
            lossy.setdefault(own, []).append(name)
    for own, names in lossy.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{dtype_name(own)} weights are rounded to {dtype_name(dtype)} ({names[0]}{more})"


def _factors(spec: UpcycleSpec, dense: DenseSource) -> dict[str, float]:
    """Return the factors by which a spec scales weights: name of the weights -> factor."""
    if dense.architecture.num_experts:
        return {"down projection": expert_scale(dense.architecture, spec)}
    factors = {"down projection": spec.down_scale}
    factors |= {"shared experts' down projection": spec.shared_scale} if spec.shared_experts else {}
    return factors | ({"output bias": spec.bias_scale} if dense.architecture.ffn_bias else {})


def _rounding(factor: float, dtype: torch.dtype) -> str:
    """Describe which numbers of a type lose digits when a factor scales them; "" if the effect is negligible."""
    if math.frexp(factor)[0] != 0.5:
        return f"is rounded in {dtype_name(dtype)}" if torch.finfo(dtype).bits < 32 else ""
    if factor < 1 and dtype is torch.float16:
        return f"rounds numbers below {torch.finfo(dtype).tiny / factor:.2g} in {dtype_name(dtype)}"
    return ""
