"""The choices for a run: experts, trainer, GPUs, layout, batch, steps and learning rates, each with its reason."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_upcycle.cli.start.parent import FoundParent
from nemo_upcycle.cli.start.texts import HoldOutShare, Texts
from nemo_upcycle.data.blend import MOST_EPOCHS, BlendConfig
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import require_class
from nemo_upcycle.models.growth import growth_spec
from nemo_upcycle.planning.hardware import BRIDGE_SOFTWARE, DEFAULT_SOFTWARE, Gpu, gpu_names, gpu_of_device, known_gpu
from nemo_upcycle.planning.layout import CPU_RANKS, Layout
from nemo_upcycle.planning.memory import GIB, checkpoint_bytes
from nemo_upcycle.planning.search import LayoutEstimate, PlanRequest, find, nearest_gpus
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import paper
from nemo_upcycle.utils.console import short_count
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.memory import free_memory_bytes


#: trainer -> module whose presence shows that the trainer is installed, and the trainer's name in texts
TRAINERS = {"nemo": ("nemo", "NeMo"), "bridge": ("megatron.bridge", "Megatron-Bridge")}
#: trainer -> field of an `Architecture` -> feature that the trainer's models lack
_LACKS = {"nemo": {"mamba": "Mamba layers", "output_gate": "attention with a gate, gated delta nets"}, "bridge": {}}
#: trainer -> software versions for which the planner estimates times
_SOFTWARE = {"nemo": DEFAULT_SOFTWARE, "bridge": BRIDGE_SOFTWARE}
#: A trial on a CPU, which takes a few minutes on two cores.
TRIAL_STEPS, TRIAL_BATCH, TRIAL_PEAK, TRIAL_WARMUP = 10, 2, 1e-4, 2
_SHORT, _SHORTER, _LARGE_PARAMS = 512, 128, 50e6
#: Training on GPUs: smallest number of steps and smallest number of sequences that the texts should provide.
_FEW_STEPS, _FEW_SEQUENCES = 200, 128
_LONGEST = 8192
#: Number of layouts among which to look for a plain layout (no interleaved stages, no split experts).
_LAYOUTS = 100
#: Memory of a trial on a CPU (bytes). First value: a parameter, its gradient and its Adam states. Second value: a
#: parameter and its gradient in each further rank; ranks share the Adam states. Third value: the program of a rank.
_CPU_BYTES, _COPY_BYTES, _PROGRAM_BYTES = 18, 6, 2 << 30
#: The table warns if the texts are read more than this many times.
_FEW_EPOCHS = BlendConfig.max_epochs
#: Bytes per parameter in the folders of step 0 and of the export.
_MODEL_BYTES = 2
#: The folder in which NVIDIA's driver lists its GPUs.
_PROC = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Wanted:
    """The user's requests; `choose` decides everything that is None.

    Attributes:
        spec: fields of the UpcycleSpec.
        gpus: number of GPUs; 0 means a trial on the CPU.
        gpu: kind of the GPUs.
        steps: optimizer steps of the training.
        epochs: number of times to read the texts, instead of `steps`.
    """

    spec: Mapping[str, Any]
    gpus: int | None = None
    gpu: str | None = None
    steps: int | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class Choices:
    """The choices for a run, independent of the trainer.

    Attributes:
        spec: specification of the upcycling.
        spec_fields: fields of the spec to write into the recipe; all other fields have their defaults.
        trainer: `nemo` or `bridge`.
        plan: plan on GPUs; None for a trial on the CPU.
        layout: parallel sizes.
        seq_length: tokens per sequence.
        global_batch: sequences per step.
        steps: optimizer steps.
        warmup: steps until the peak learning rate.
        peak, end: peak and final learning rate.
        suite: evaluation suite.
        hold_out: share of the texts that is held out; None if the texts have their own splits.
        rows: name, value and reason of each choice, to be shown.
        arch: architecture of the upcycled model.
        dense: architecture of the parent.
    """

    spec: UpcycleSpec
    spec_fields: dict[str, Any]
    trainer: str
    plan: LayoutEstimate | None
    layout: Layout
    seq_length: int
    global_batch: int
    steps: int
    warmup: int
    peak: float
    end: float
    suite: str
    hold_out: HoldOutShare | None
    rows: tuple[tuple[str, str, str], ...]
    arch: Architecture
    dense: Architecture

    @property
    def gpus(self) -> int:
        """Number of GPUs; 0 on the CPU."""
        return self.plan.request.gpus if self.plan else 0

    @property
    def needed_disk_bytes(self) -> int:
        """Bytes of the run's folder: last checkpoint of each training, a checkpoint being written, step 0, export."""
        at_once = 2 if self.steps > paper.CHECKPOINT_STEPS else 1
        states = checkpoint_bytes(self.arch) * at_once + checkpoint_bytes(self.dense)
        return states + 2 * _MODEL_BYTES * self.arch.total_params

    @property
    def needed_memory_bytes(self) -> int:
        """Bytes of memory that a trial on the CPU needs."""
        ranks = self.layout.gpus
        copies = _COPY_BYTES * (ranks - 1) * self.dense.total_params
        return _CPU_BYTES * self.arch.total_params + copies + _PROGRAM_BYTES * ranks


def choose_trainer() -> str:
    """Return the trainer of this environment.

    Raises:
        UpcycleError: no trainer is installed.
    """
    for name, (module, _) in TRAINERS.items():
        if _has(module):
            return name
    fix = "run `nemo-upcycle doctor`, which prints the command that installs one"
    raise UpcycleError("No trainer", kind="missing", got="is installed here (NeMo or Megatron-Bridge)", fix=fix)


def _has(module: str) -> bool:
    """Return whether a module is installed, without importing the package around it."""
    top, _, inside = module.partition(".")
    found = find_spec(top)
    places = found.submodule_search_locations or () if found else ()
    return found is not None and (not inside or any(Path(place, inside).is_dir() for place in places))


def gpus_here() -> tuple[int, str | None]:
    """Return the number of GPUs that the driver lists, and the planner's name of these GPUs, if any."""
    found = [path.read_text(errors="replace") for path in _PROC.glob("*/information")]
    model = re.search(r"Model:\s*(.+)", found[0]) if found else None
    gpu = gpu_of_device(model[1]) if model else None
    return len(found), next((name for name in gpu_names() if known_gpu(name) == gpu), None)


def chosen_spec(parent: FoundParent, fields: Mapping[str, Any]) -> tuple[UpcycleSpec, dict[str, Any]]:
    """Return the spec, and the fields to write into the recipe.

    Raises:
        UpcycleError: the parent cannot be upcycled in this way, or no Hugging Face class can hold the result.
    """
    if experts := parent.arch.num_experts:
        count = fields.get("num_experts", 2 * experts)
        others = {name: value for name, value in fields.items() if name not in ("num_experts", "top_k")}
        spec, usual = replace(growth_spec(parent.arch, count, fields.get("top_k")), **others), UpcycleSpec()
        stated = {name: value for name, value in asdict(spec).items() if value != getattr(usual, name)}
        stated = {"num_experts": count, "top_k": spec.top_k} | stated
    else:
        stated = {"num_experts": 8, "top_k": 2} | dict(fields)
        spec = UpcycleSpec(**stated)
    require_class(parent.arch.upcycled(spec))
    return spec, stated


def choose(parent: FoundParent, texts: Texts, trainer: str, wanted: Wanted) -> Choices:
    """Choose all settings of a run.

    Args:
        parent: dense model.
        texts: texts to train on.
        trainer: result of `choose_trainer`.
        wanted: the user's requests.

    Raises:
        UpcycleError: no run satisfies the requests and fits.
    """
    spec, stated = chosen_spec(parent, wanted.spec)
    if lacks := [what for field, what in _LACKS[trainer].items() if getattr(parent.arch, field)]:
        raise UpcycleError(
            TRAINERS[trainer][1],
            kind="refused",
            got=f"cannot train a {parent.arch.hf_class}: its models have no {', '.join(lacks)}",
            fix=f"type the command in an environment with {TRAINERS['bridge'][1]}",
        )
    dense, arch = parent.arch, parent.arch.upcycled(spec)
    number, kind = gpus_here() if wanted.gpus is None else (wanted.gpus, None)
    kind = wanted.gpu or kind or "h100"
    if wanted.gpu and known_gpu(wanted.gpu) and not number:
        raise UpcycleError("--gpu", kind="refused", got=f"{wanted.gpu} needs the number of GPUs", fix="add --gpus N")
    why = "asked for" if "num_experts" in wanted.spec else "the paper's"
    rows = [
        ("experts", f"{spec.num_experts}, top-{spec.top_k}", why),
        ("trainer", TRAINERS[trainer][1], "installed here"),
    ]
    if not number:
        small = dense.total_params < _LARGE_PARAMS
        seq_length = min(_SHORT if small else _SHORTER, dense.max_positions)
        batch = TRIAL_BATCH
        steps, why_steps = _steps(texts, wanted, batch * seq_length, TRIAL_STEPS)
        plan, peak, warmup = None, TRIAL_PEAK, min(TRIAL_WARMUP, steps - 1)
        can_part = len(os.sched_getaffinity(0)) >= CPU_RANKS and spec.num_experts % CPU_RANKS == 0
        ranks = CPU_RANKS if can_part else 1
        layout = Layout(gpus=ranks, ep=ranks)
        rows.append(
            (
                "where",
                f"this CPU, {ranks} rank{'s' * (ranks > 1)}: a trial",
                "no GPU here" if wanted.gpus is None else "asked for",
            )
        )
        rows.append(("sequences", f"{seq_length} tokens, {batch} a step", "short, for a CPU"))
        trial = "a trial, to show that everything works; for a real training: --gpus N --gpu NAME"
        rows.append(("steps", f"{steps:,}", why_steps or trial))
        rows.append(("learning rate", f"{peak:g}, warm-up {warmup}", "the demo's, for few steps"))
    else:
        seq_length = _length(texts, dense)
        batch = _batch(texts, seq_length, number)
        once = max(1, min(paper.STEPS, texts.tokens // (batch * seq_length)))
        steps, why_steps = _steps(texts, wanted, batch * seq_length, once)
        warmup = min(paper.WARMUP_STEPS, steps // 10)
        peak = paper.PEAK
        plan = _plan(arch, known_gpu(kind), number, seq_length, batch, steps, trainer)
        layout = plan.layout
        why = "asked for" if wanted.gpus is not None else "found here"
        rows.append(("where", f"{number} x {plan.request.gpu.name}", why))
        rows.append(("layout", layout.sizes, "the planner's fastest plain layout that fits"))
        rows.append(
            ("sequences", f"{seq_length:,} tokens, {batch:,} a step", "from the texts and the parent's positions")
        )
        is_once = steps * batch * seq_length <= texts.tokens
        fewest = f"the fewest possible: each step has a sequence for each of {number:,} GPUs"
        default = "reads the texts once" if is_once else fewest
        rows.append(("steps", f"{steps:,}", why_steps or default))
        rows.append(("learning rate", f"{peak:g}, warm-up {warmup}", "the paper's"))
    rows.append(("baseline", "the dense parent, on the same texts", "to compare with"))
    epochs = steps * batch * seq_length / texts.tokens
    often = f"MORE THAN {_FEW_EPOCHS:g} TIMES: repeated texts teach less and less; give more texts or fewer steps"
    number_text = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.2g}"
    why = often if epochs > _FEW_EPOCHS else "from the sample"
    rows.append(("epochs", f"{number_text}: {short_count(steps * batch * seq_length)} tokens are read", why))
    return Choices(
        spec=spec,
        spec_fields=stated,
        trainer=trainer,
        plan=plan,
        layout=layout,
        seq_length=seq_length,
        global_batch=batch,
        steps=steps,
        warmup=warmup,
        peak=peak,
        end=paper.END if plan else peak / 10,
        suite="heldout" if plan else "trial",
        hold_out=texts.hold_out(seq_length),
        rows=tuple(rows),
        arch=arch,
        dense=dense,
    )


def _steps(texts: Texts, wanted: Wanted, step_tokens: int, default: int) -> tuple[int, str]:
    """Return the number of optimizer steps, and what the user asked for ("" if nothing).

    Args:
        texts: texts to train on.
        wanted: the user's requests, with steps or epochs.
        step_tokens: tokens per step.
        default: number of steps if the user asks for neither steps nor epochs.

    Raises:
        UpcycleError: the texts would be read more than `MOST_EPOCHS` times, and the user did not ask for epochs.
    """
    if wanted.epochs:
        return max(1, math.ceil(wanted.epochs * texts.tokens / step_tokens)), f"{wanted.epochs:g} epochs asked for"
    steps = wanted.steps or default
    epochs = steps * step_tokens / texts.tokens
    if epochs <= MOST_EPOCHS:
        return steps, "asked for" if wanted.steps else ""
    most = MOST_EPOCHS * texts.tokens // step_tokens
    fewer, without = (f"--steps {most}", " in place of --steps") if most and wanted.steps else ("fewer --gpus", "")
    raise UpcycleError(
        f"--steps {steps}" if wanted.steps else "The training",
        kind="state",
        got=f"would read the texts {epochs:,.0f} times ({steps:,} steps of {step_tokens:,} tokens)",
        fix=(
            f"give more texts or {fewer}. To read them more than {MOST_EPOCHS} times, give --epochs "
            f"{math.ceil(epochs)}{without}"
        ),
    )


def _length(texts: Texts, dense: Architecture) -> int:
    """Return the sequence length: the largest power of two that fits the parent's positions and the texts.

    The length is at most the paper's length. The texts should provide at least `_FEW_SEQUENCES` sequences of this
    length.
    """
    most = min(_LONGEST, dense.max_positions, max(_SHORT, texts.tokens // _FEW_SEQUENCES))
    return 1 << (most.bit_length() - 1)


def _batch(texts: Texts, seq_length: int, gpus: int) -> int:
    """Return the sequences per step: as many tokens as in the paper, or fewer if the texts give too few steps."""
    most = max(1, paper.TOKENS_A_STEP // seq_length)
    few = max(1, texts.tokens // (_FEW_STEPS * seq_length))
    batch = min(most, 1 << (few.bit_length() - 1))
    return max(gpus, batch // gpus * gpus)


def _plan(
    arch: Architecture, gpu: Gpu, gpus: int, seq_length: int, batch: int, steps: int, trainer: str
) -> LayoutEstimate:
    """Return the fastest plan that fits, among layouts without virtual stages and expert tensor parallelism."""
    software = _SOFTWARE[trainer]
    work = Workload(seq_length=seq_length, global_batch=batch, routing="natural")
    tokens = float(steps * batch * seq_length)
    request = PlanRequest(arch=arch, gpu=gpu, gpus=gpus, work=work, tokens=tokens, software=software)
    plans = [one for one in find(request, _LAYOUTS) if one.layout.vp == one.layout.etp == 1 and one.verdict != "no"]
    if plans:
        return next((plan for plan in plans if plan.verdict == "fits"), plans[0])
    other = nearest_gpus(request)
    fix = f"give --gpus {other}" if other else "give fewer --experts"
    raise UpcycleError("--gpus", got=gpus, expected=f"enough for {short_count(arch.total_params)} parameters", fix=fix)


def shortages(choices: Choices, folder: Path) -> Iterator[UpcycleError]:
    """Yield an error if the disk is too small for a run in a folder, or the memory too small for a trial."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, choices.needed_disk_bytes
    if free < needed:
        yield UpcycleError(
            f"The disk of {existing}",
            kind="state",
            got=f"has {size_text(free)} free, and the run needs {size_text(needed)}",
            fix="give --dir on a larger disk, or fewer --experts",
        )
    if choices.plan is None and (memory := free_memory_bytes()) and memory < choices.needed_memory_bytes:
        yield UpcycleError(
            "This machine",
            kind="state",
            got=(
                f"has {memory / GIB:.1f} GiB of memory free, and a trial on the CPU needs "
                f"{choices.needed_memory_bytes / GIB:.1f} GiB"
            ),
            fix="give fewer --experts, a smaller model, or --gpus N",
        )


def writable_part(folder: Path) -> Path:
    """Return the existing part of a path, and check that a file can be written there.

    Raises:
        UpcycleError: no file can be written there.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return existing
    except OSError as error:
        why = str(error.strerror).lower() if existing.is_dir() else "it is a file"
    raise UpcycleError(f"Cannot write in {existing}: {why}. Give another --dir.")
