"""Compute router rows from prompts, with one pass of the dense model over the prompts of each copy.

Only one layer is in memory at a time, in float32. The layer processes all prompts and is then freed, and its outputs
are the inputs of the next layer. The layers are classes of transformers, and get the same arguments as in a model of
transformers. No GPU is needed, and the file has the same bits for any number of threads.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.init.calibration_file import FORMAT, LINEAGE, ROUTER, Calibration
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.online.streaming import Run, StreamedModel, check_streamed, several_at_a_time
from nemo_upcycle.package_info import __version__
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.same_parent import parent_digest
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import resolved, whole_file
from nemo_upcycle.utils.progress import ProgressLine


@dataclass(frozen=True)
class Sample:
    """Tokens of the prompts, in batches that do not depend on the machine.

    Args:
        batches: token ids, [B, S] each.
        labels: for each batch, the copy that its prompts belong to.
        about: origin of the prompts as plain values, recorded in the file's lineage.
    """

    batches: tuple[torch.Tensor, ...]
    labels: tuple[int, ...]
    about: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(batch.numel() for batch in self.batches)


@dataclass(frozen=True)
class CalibrationReport:
    """The result of `calibrate`.

    Attributes:
        path: calibration file.
        sha256: hash of the file.
        made: True if the file was made now, False if a finished file was found.
        tokens: number of tokens in the sample.
        layers: number of layers that have a router in the file.
        size_bytes: size of the file.
        seconds: time taken.
        peak_rss_gib: peak memory over the whole life of the process.
    """

    path: Path
    sha256: str
    made: bool
    tokens: int
    layers: int
    size_bytes: int
    seconds: float = 0.0
    peak_rss_gib: float = 0.0


def calibrate(
    dense: DenseSource, output: Path, spec: UpcycleSpec, sample: Sample, *, replace: bool = False
) -> CalibrationReport:
    """Compute the router rows of a spec's MoE layers, and write them into a calibration file.

    Args:
        dense: open dense model, whose folder has a `config.json`; if several models are mixed, only the first model
            runs.
        output: file to write.
        spec: how the dense model will be upcycled.
        sample: tokens to run the model on.
        replace: whether to replace a file that was made from other inputs.

    Raises:
        SpecError: the spec needs no calibration file.
        CheckpointError: the dense model cannot run layer by layer, or the sample has tokens outside the model's
            vocabulary.
        UpcycleError: the prompts do not tell the copies apart, or the output is a file that was made from other
            inputs.

    Example:
        >>> with open_dense("models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     calibrate(dense, Path("prompts.safetensors"), spec, calibration_sample(spec, dense.path))
    """
    start_s, output = time.monotonic(), resolved(output)
    require_use(spec)
    moe_arch = dense.architecture.upcycled(spec)
    check_streamed(dense, sample.batches)
    lineage = _lineage(dense, spec, sample)
    if output.exists():
        found = Calibration(output)
        if found.lineage == lineage:
            return _report(found, sample, start_s, made=False)
        if not replace:
            fix = "choose another name, or remove the file first"
            raise UpcycleError(
                str(output), kind="state", got="is a calibration file made with other settings", fix=fix
            )
    with several_at_a_time() as run:
        tensors = _routers(dense.branches()[0], moe_arch, spec.copies, sample, run)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as aside:
        save_file(tensors, aside, metadata={LINEAGE: json.dumps(lineage, sort_keys=True)})
    return _report(Calibration(output), sample, start_s, made=True)


def require_use(spec: UpcycleSpec) -> None:
    """Check that a spec needs a calibration file.

    Raises:
        SpecError: the spec needs no calibration file.
    """
    if not spec.needs_calibration:
        raise SpecError(
            field="router_init",
            kind="refused",
            got=f"is {spec.router_init}, and a calibration is used only with <router_init>=prompts",
            fix="set <router_init>=prompts",
        )


def _lineage(dense: DenseSource, spec: UpcycleSpec, sample: Sample) -> dict[str, Any]:
    """Return everything that determines the bytes of the file."""
    arch = dense.architecture
    sizes = {name: getattr(arch, name) for name in ("hidden_size", "ffn_size", "num_layers")}
    return {
        "format": FORMAT,
        "parent": {"path": str(dense.branches()[0].path.resolve()), "sha256": parent_digest(dense), **sizes},
        "data": sample.about,
        "settings": {
            "router_init": spec.router_init,
            "copies": spec.copies,
            "moe_layers": spec.moe_layers,
            "tokens": sample.tokens,
        },
        "version": __version__,
    }


def _report(calibration: Calibration, sample: Sample, start_s: float, *, made: bool) -> CalibrationReport:
    return CalibrationReport(
        path=calibration.path,
        sha256=calibration.sha256,
        made=made,
        tokens=sample.tokens,
        layers=sum(calibration.has(layer) for layer in range(calibration.lineage["parent"]["num_layers"])),
        size_bytes=calibration.path.stat().st_size,
        seconds=round(time.monotonic() - start_s, 3),
        peak_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    )


def _routers(
    dense: DenseSource, moe_arch: Architecture, copies: int, sample: Sample, run: Run
) -> dict[str, torch.Tensor]:
    """Run all layers up to the last MoE layer, and compute the router rows of each MoE layer."""
    model, tensors = StreamedModel(dense), dict[str, torch.Tensor]()
    last = max(layer for layer in range(moe_arch.num_layers) if moe_arch.is_moe_layer(layer))
    down = mapping_of("fc2", dense.architecture).hf[0].partition("{layer}.")[2].removesuffix(".weight")
    states, calls = model.embedded(sample.batches)
    with ProgressLine("calibrate", (last + 1) * len(states)) as line:
        for layer in range(last + 1):
            module, entered = model.filled(layer), threading.local()

            def note(_: Any, args: tuple[torch.Tensor, ...], entered: Any = entered) -> None:
                entered.states_ND = args[0].flatten(0, -2)

            def computed(
                state_BSD: torch.Tensor, layer: int = layer, module: Any = module, entered: Any = entered
            ) -> tuple[torch.Tensor, torch.Tensor]:
                call = calls[tuple(state_BSD.shape[:2])][layer]
                out = module(state_BSD, *call["args"], **call["kwargs"])
                return out[0] if isinstance(out, tuple) else out, entered.states_ND

            handle = module.get_submodule(down.rpartition(".")[0]).register_forward_pre_hook(note)
            found = []
            for one in run(computed, states):
                found.append(one)
                line.advance(note=f"layer {layer}")
            states = [out for out, _ in found]
            handle.remove()
            module.to("meta")
            if moe_arch.is_moe_layer(layer):
                rows_CD = router_rows([entered_ND for _, entered_ND in found], sample.labels, copies, run)
                tensors[ROUTER.format(layer=layer)] = rows_CD.float().contiguous()
    return dict(sorted(tensors.items()))


def router_rows(batches: Sequence[torch.Tensor], labels: Sequence[int], copies: int, run: Run) -> torch.Tensor:
    """Compute router rows from the directions of the copies' mean activations, scaled to a logit spread of 1.

    The spread is computed in two steps: the standard deviation of each token's logits over the copies, and then the
    root mean square of these deviations over the tokens. The mean of all rows is subtracted, because it adds the same
    number to all logits of a token and changes neither softmax nor top-k.

    Args:
        batches: inputs of a layer's router, [N, D] in float32 for each batch.
        labels: for each batch, the copy that its prompts belong to.
        copies: number of copies C.
        run: function that applies another function to items and yields the results in order.

    Returns:
        The rows [C, D] in float64.

    Raises:
        UpcycleError: the rows do not tell the copies apart.
    """
    sums_CD = torch.zeros(copies, batches[0].shape[1], dtype=torch.float64)
    for label, batch_ND in zip(labels, batches, strict=True):
        sums_CD[label] += batch_ND.sum(0, dtype=torch.float64)
    unit_CD = normalize(sums_CD, dim=1)
    rows_CD = unit_CD - unit_CD.mean(0)
    turned_DC = rows_CD.T.float().contiguous()

    def squares(batch_ND: torch.Tensor) -> torch.Tensor:
        return (batch_ND @ turned_DC).double().square_().mean(1).sum()  # variance: the logits' mean is zero

    tokens = sum(len(batch) for batch in batches)
    spread = float(torch.stack(list(run(squares, batches))).sum() / tokens) ** 0.5
    if not (float(rows_CD.norm()) > 1e-6 * float(unit_CD.norm()) and 0 < spread < float("inf")):
        raise UpcycleError(
            "Router rows from the prompts",
            kind="state",
            got="are NaN" if spread != spread else "are the same for all copies",
            fix="give prompts that differ more",
        )
    scaled_CD: torch.Tensor = rows_CD / spread
    return scaled_CD
