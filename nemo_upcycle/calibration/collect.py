"""One pass of a dense model over a sample of text: what routers from data and splits by co-activation are made of.

The layers take turns: one is in memory, in float32, computes all batches and is given up; what it hands on is the
input of the next. Layers are the classes of transformers, called as its model calls them. A stopped pass goes on with
the layer that it had come to. No GPU is needed, and the file has the same bits whatever the number of threads.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.calibration.batches import several_at_a_time
from nemo_upcycle.calibration.layers import LayerInputs
from nemo_upcycle.calibration.streaming import Calls, StreamedModel, check_streamed
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.init.calibration import FORMAT, LINEAGE, NEURONS, ROUTER, Calibration, LayerSample, scaled_rows
from nemo_upcycle.init.coactivation import split_by_coactivation
from nemo_upcycle.init.rng import block_generator
from nemo_upcycle.init.routers import CalibratedInit
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.package_info import __version__
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.calibrated import parent_digest
from nemo_upcycle.spec import ROUTER_INITS, UpcycleSpec
from nemo_upcycle.utils.files import aside_of, clear, read_json, resolved, take_lock, whole_file, write_json
from nemo_upcycle.utils.progress import ProgressLine


#: Tokens that a router's row, or a part of a network, is told by at least; of prompts one is enough.
TOKENS_PER_COPY = 64
_PLAN, _LOCK, _STATES, _LAYER = "plan.json", ".lock", "states.{layer}.safetensors", "layer.{layer}.safetensors"


@dataclass(frozen=True)
class Sample:
    """Tokens of text, in batches that do not depend on the machine.

    Args:
        batches: token ids, [B, S] each.
        labels: of each batch, which source of a blend, or which copy's prompts, it is of.
        about: where it is from, as plain values: what the file's lineage says.
    """

    batches: tuple[torch.Tensor, ...]
    labels: tuple[int, ...]
    about: dict[str, Any]

    @property
    def tokens(self) -> int:
        """How many they are."""
        return sum(batch.numel() for batch in self.batches)


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did.

    Attributes:
        path: of the file.
        sha256: of the file.
        made: whether it was made now, and not found finished.
        tokens: of the sample.
        layers: that have routers or splits in it.
        size_bytes: of the file.
        within: of every split layer, the share of co-activated pairs in one part, and that of consecutive parts.
        seconds: that it took.
        peak_rss_gib: of the process, in its whole life.
    """

    path: Path
    sha256: str
    made: bool
    tokens: int
    layers: int
    size_bytes: int
    within: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss_gib: float = 0.0


def calibrate(
    dense: DenseSource,
    output: Path,
    spec: UpcycleSpec,
    sample: Sample,
    *,
    replace: bool = False,
    threads: int | None = None,
    save_every_s: float = 20.0,
) -> CalibrationReport:
    """Write the calibration file of a spec: its routers from data, and the order of the neurons.

    Work in progress is in a hidden folder beside it. A call with the same parent, sample and spec goes on there.

    Args:
        dense: the open dense model, whose folder has a `config.json`; of several, the first is run.
        output: the file to write.
        spec: what is to be made of the dense model.
        sample: what to run it on.
        replace: whether to replace a file that was made from something else.
        threads: how many batches at a time; None: as many as torch has threads.
        save_every_s: how often to keep what a stopped pass goes on from.

    Raises:
        SpecError: the spec needs no such file.
        CheckpointError: the dense model cannot be run layer by layer, or the sample is of another tokenizer.
        UpcycleError: there are too few tokens, or another file is in the way.

    Example:
        >>> with open_dense("models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     calibrate(dense, Path("kmeans.safetensors"), spec, blend_sample(blend, spec))
    """
    start_s, output = time.monotonic(), resolved(output)
    moe_arch = _check(dense, spec, sample)
    lineage = _lineage(dense, spec, sample)
    if output.exists():
        found = Calibration(output)
        if found.lineage == lineage | {"within": found.lineage["within"]}:
            return _report(found, sample, start_s, made=False)
        if not replace:
            fix = "choose another name, or remove it first"
            raise UpcycleError(str(output), got="a calibration of other settings", expected="no such file", fix=fix)
    with _work_folder(output, lineage) as folder, several_at_a_time(threads) as run:
        _Pass(dense.branches()[0], moe_arch, spec, sample, folder, run, save_every_s).run_layers()
        tensors, within = dict[str, torch.Tensor](), dict[str, list[float]]()
        for path in folder.glob(_LAYER.format(layer="*")):
            tensors |= load_file(path)
        for path in folder.glob("within.*.json"):
            within |= read_json(path)
        metadata = {LINEAGE: json.dumps(lineage | {"within": within}, sort_keys=True)}
        with whole_file(output) as aside:
            save_file(dict(sorted(tensors.items())), aside, metadata=metadata)
    return _report(Calibration(output), sample, start_s, made=True)


def require_use(spec: UpcycleSpec) -> None:
    """Check that a spec reads something from a calibration file.

    Raises:
        SpecError: it does not.
    """
    if not spec.needs_calibration:
        expected = "<router_init>=kmeans, ridge or prompts, or <expert_split>=coactivation: all else needs no data"
        raise SpecError(field="router_init", got=spec.router_init, expected=expected, fix="set one of them")


def _check(dense: DenseSource, spec: UpcycleSpec, sample: Sample) -> Architecture:
    """Check that there is something to do, and all that is needed for it; return the MoE model's architecture."""
    require_use(spec)
    moe_arch = dense.architecture.upcycled(spec)
    check_streamed(dense, sample.batches, "sample", "give a blend that was made with the tokenizer of this model")
    needed = max(spec.copies if spec.reads_router else 1, spec.granularity if spec.reads_split else 1)
    needed *= 1 if ROUTER_INITS[spec.router_init].texts == "prompts" and not spec.reads_split else TOKENS_PER_COPY
    if sample.tokens < needed:
        raise UpcycleError(
            "tokens of the sample",
            got=sample.tokens,
            expected=f"{needed} or more",
            fix="give more text, or fewer copies",
        )
    return moe_arch


def _lineage(dense: DenseSource, spec: UpcycleSpec, sample: Sample) -> dict[str, Any]:
    """Return what the bytes of the file follow from."""
    arch = dense.architecture
    sizes = {name: getattr(arch, name) for name in ("hidden_size", "ffn_size", "num_layers")}
    return {
        "format": FORMAT,
        "parent": {"path": str(dense.branches()[0].path.resolve()), "sha256": parent_digest(dense), **sizes},
        "data": sample.about,
        "settings": {
            "router_init": spec.router_init,
            "copies": spec.copies,
            "expert_split": spec.expert_split,
            "granularity": spec.granularity,
            "moe_layers": spec.moe_layers,
            "seed": spec.seed,
            "tokens": sample.tokens,
        },
        "version": __version__,
    }


def _report(calibration: Calibration, sample: Sample, start_s: float, *, made: bool) -> CalibrationReport:
    arch_layers = range(calibration.lineage["parent"]["num_layers"])
    layers = sum(calibration.has(ROUTER, layer) or calibration.has(NEURONS, layer) for layer in arch_layers)
    return CalibrationReport(
        path=calibration.path,
        sha256=calibration.sha256,
        made=made,
        tokens=sample.tokens,
        layers=layers,
        size_bytes=calibration.path.stat().st_size,
        within=calibration.lineage["within"],
        seconds=round(time.monotonic() - start_s, 3),
        peak_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    )


@contextmanager
def _work_folder(output: Path, lineage: dict[str, Any]) -> Iterator[Path]:
    """Give the folder to work in, to one process at a time, with what a stopped pass of this lineage left there."""
    folder = aside_of(output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(folder / _LOCK)
    except TimeoutError:
        raise UpcycleError(
            str(output), got="another process writing it", expected="none", fix="wait for it, or choose another name"
        ) from None
    with lock:
        if not (folder / _PLAN).is_file() or read_json(folder / _PLAN) != lineage:
            clear(folder)
            write_json(folder / _PLAN, lineage)
        try:
            yield folder
        except UpcycleError:  # work based on a user's mistake is not worth keeping
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


class _Pass:
    """The pass itself. What the layers hand on is `states`: [B, S, D] in float32 for each batch."""

    def __init__(
        self,
        dense: DenseSource,
        moe_arch: Architecture,
        spec: UpcycleSpec,
        sample: Sample,
        folder: Path,
        run: Callable[[Callable[[Any], Any], Sequence[Any]], Any],
        save_every_s: float,
    ) -> None:
        self.dense, self.arch, self.spec, self.sample = dense, moe_arch, spec, sample
        self.folder, self.run, self.save_every_s = folder, run, save_every_s
        self.model = StreamedModel(dense)
        self.last = max(layer for layer in range(moe_arch.num_layers) if moe_arch.is_moe_layer(layer))

    def run_layers(self) -> None:
        """Run all layers up to the last MoE layer, from the one that an earlier pass came to."""
        kept = [int(path.name.split(".")[1]) for path in self.folder.glob(_STATES.format(layer="*"))]
        first, saved_s = max(kept, default=0), time.monotonic()
        states, calls = self.model.embedded(self.sample.batches)
        if first:
            stored = load_file(self.folder / _STATES.format(layer=first))
            states = [stored[f"{number}"] for number in range(len(states))]
        count = len(states)
        with ProgressLine("calibrate", (self.last + 1) * count) as line:
            line.advance(first * count)
            for layer in range(first, self.last + 1):
                states = self._layer(layer, states, calls, line)
                if layer < self.last and time.monotonic() - saved_s >= self.save_every_s:
                    self._keep(layer + 1, states)
                    saved_s = time.monotonic()

    def _keep(self, layer: int, states: list[torch.Tensor]) -> None:
        """Keep what a layer gets, and give up what an earlier one got."""
        before = [*self.folder.glob(_STATES.format(layer="*"))]
        with whole_file(self.folder / _STATES.format(layer=layer)) as aside:
            save_file({f"{number}": state.contiguous() for number, state in enumerate(states)}, aside)
        for path in before:
            path.unlink()

    def _layer(self, layer: int, states: list[torch.Tensor], calls: Calls, line: ProgressLine) -> list[torch.Tensor]:
        """Run a layer on all batches, write what is made of what enters its network, and return what it hands on."""
        module, is_moe = self.model.filled(layer), self.arch.is_moe_layer(layer)
        is_done = not is_moe or (self.folder / _LAYER.format(layer=layer)).is_file()
        inputs = LayerInputs(self._network(module), self.spec.reads_split and not is_done)

        def computed(state_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
            call = calls[tuple(state_BSD.shape[:2])][layer]
            out = module(state_BSD, *call["args"], **call["kwargs"])
            entered_ND, marks_NF = inputs.taken()
            out = out[0] if isinstance(out, tuple) else out
            return out, None if is_done else entered_ND, marks_NF

        new, entered, marks = list[torch.Tensor](), list[Any](), list[Any]()
        for out, entered_ND, marks_NF in self.run(computed, states):
            new.append(out)
            entered.append(entered_ND)
            marks.append(marks_NF)
            line.advance(note=f"layer {layer}")
        inputs.remove()
        module.to("meta")
        if not is_done:
            self._write(layer, entered, marks)
        return new

    def _network(self, module: Any) -> tuple[Any, Any]:
        """Return a layer's network, and its down projection."""
        down = mapping_of("fc2", self.dense.architecture).hf[0].partition("{layer}.")[2].removesuffix(".weight")
        return module.get_submodule(down.rpartition(".")[0]), module.get_submodule(down)

    def _write(self, layer: int, entered: list[torch.Tensor], marks: list[torch.Tensor]) -> None:
        """Write the rows of a layer's router and the order of its neurons."""
        tensors, init = dict[str, torch.Tensor](), ROUTER_INITS[self.spec.router_init]
        if isinstance(init, CalibratedInit):
            generator = block_generator(self.spec.seed, "calibration", init.name, layer)
            sample = LayerSample(entered, self.sample.labels, self.spec.copies, generator, self.run)
            tensors[ROUTER.format(layer=layer)] = scaled_rows(init.fit(sample), sample).float().contiguous()
        if self.spec.reads_split:
            split = split_by_coactivation(marks, self.spec.granularity, self.run)
            tensors[NEURONS.format(layer=layer)] = split.neurons.int()
            shares = [round(split.within, 4), round(split.within_consecutive, 4)]
            write_json(self.folder / f"within.{layer}.json", {str(layer): shares})
        with whole_file(self.folder / _LAYER.format(layer=layer)) as aside:
            save_file(tensors, aside)
