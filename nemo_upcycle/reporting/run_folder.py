"""Read and check the files of a run's folder that a report needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_upcycle.data.finished import CONTAMINATION, MANIFEST
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.heldout import BITS
from nemo_upcycle.evaluation.statistics import error_of, half_width
from nemo_upcycle.trainers.lineage import BRANCHES, Branch, read_branches
from nemo_upcycle.trainers.metrics_file import METRICS
from nemo_upcycle.utils.files import CHANGES, MARKER, read_json, read_json_lines, read_text
from nemo_upcycle.utils.schema import require_known


#: The evaluated models in the order of the report -> their names in the report.
MODELS = {
    "dense": "parent",
    "step0": "MoE at step 0",
    "trained": "trained MoE",
    "dense_ct": "trained baseline",
}
# The keys that each file must have because the report prints them, with the types of their values.
_NUMBER = int | float
_COUNTS = ("dense_params", "total_params", "active_params", "bytes_read", "bytes_needed", "bytes_written", "seconds")
_RECEIPT = {"spec": dict, "source": str, "exact": bool, **dict.fromkeys((*_COUNTS, "ranks"), _NUMBER), "layout": dict}
_EVALUATION = dict.fromkeys(("metrics", "items", "groups", "settings", "versions", "seconds", "model"), dict)
_CONTAMINATION = {"sets": dict, "report": dict}
_STEP = ("step", "tokens", "seconds")
#: Numbers that a line may have in addition to `_STEP`.
_NUMBERS = ("loss", "validation_loss", "lr", "memory_gib")
_SETTINGS = {
    **dict.fromkeys(("precision", "optimizer", "data"), str),
    **dict.fromkeys(("schedule", "flops_per_token"), dict),
    **dict.fromkeys(("max_steps", "global_batch_size", "micro_batch_size", "seq_length", "ranks"), _NUMBER),
    **dict.fromkeys(("max_lr", "weight_decay"), _NUMBER),
}


@dataclass(frozen=True)
class Curve:
    """The metrics of one training stage.

    Attributes:
        steps: entries that the stage wrote, one per training step, in order.
        validation: pairs of tokens seen and validation loss, in order.
        scores: tuples of three numbers, in order: tokens seen, bits per byte of held-out text on the live model, and
            half of the 95 % interval over documents (None if there is only one document).
        branches: branches of a training that was rewound, in order, the present one last; else empty.
        earlier: number of an earlier branch -> its curve from the step on at which the next branch begins; a branch
            without a step after this one is missing.
    """

    steps: list[dict[str, Any]]
    validation: list[tuple[int, float]]
    scores: list[tuple[int, float, float | None]] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    earlier: dict[int, Curve] = field(default_factory=dict)

    @property
    def step_tokens(self) -> int:
        """Number of tokens of a step."""
        first = self.steps[0]
        return int(first["tokens"] // max(1, first["step"]))


@dataclass(frozen=True)
class RunRecord:
    """The inputs of a report.

    Attributes:
        recipe: name of the recipe, from `pipeline.json`.
        dense: address of the parent.
        trainer: `nemo` or `bridge`.
        receipt: receipt of the check of step 0 on one rank, with its comparison of logits.
        online_receipt: receipt of the upcycling inside the training job; None if there is none.
        curves: stage -> curve, for `pretrain` and, unless it was skipped, `dense_ct`.
        settings: stage -> content of `training.json`.
        changes: stage -> settings that were changed after the stage had started.
        evaluations: name in `MODELS` -> its evaluation; `dense_ct` may be missing.
        command: typed command line; None if the run did not note it.
        recipes: stage -> file of its resolved recipe, relative to the run's folder.
        stage_seconds: finished stage -> wall time (seconds); each stage follows the stages that it needs.
        contamination: content of the data's `contamination.json`; None if the file is missing.
        heldout_overlap: held-out text in training text, from the data's `manifest.json`; None if nobody searched for
            it.
        texts: sources in the data's `manifest.json`, with the amount of text kept and lost of each source.
    """

    recipe: str
    dense: str
    trainer: str
    receipt: dict[str, Any]
    online_receipt: dict[str, Any] | None
    curves: dict[str, Curve]
    settings: dict[str, dict[str, Any]]
    changes: dict[str, list[dict[str, Any]]]
    evaluations: dict[str, dict[str, Any]]
    command: str | None
    recipes: dict[str, str]
    stage_seconds: dict[str, float]
    contamination: dict[str, Any] | None = None
    heldout_overlap: dict[str, Any] | None = None
    texts: dict[str, Any] = field(default_factory=dict)


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        UpcycleError: the folder is missing, or a file in it is missing or damaged; the message names the stage that
            writes the file.
    """
    require_run(folder)
    markers = read_markers(folder)
    left_out = {"dense_ct"} if markers.get("dense_ct", {}).get("outputs", {}).get("left_out") else set()
    trained = [stage for stage in ("pretrain", "dense_ct") if stage not in left_out]
    contamination = data_folder(folder, markers) / CONTAMINATION
    online, command = folder / "pretrain/receipt.json", folder / "command.txt"
    manifest = read_manifest(folder, markers)
    plan = _read(folder / "pipeline.json", "import", {"recipe": str, "dense": str})
    return RunRecord(
        recipe=plan["recipe"],
        dense=plan["dense"],
        trainer=plan.get("trainer", "nemo"),
        receipt=_read(folder / "receipt.json", "upcycle", _RECEIPT),
        online_receipt=_read(online, "pretrain", _RECEIPT) if online.is_file() else None,
        curves={stage: read_training(_made_by(stage, folder / stage / METRICS).parent) for stage in trained},
        settings={stage: read_settings(folder, stage) for stage in trained},
        changes={
            stage: [change for _, change in read_json_lines(path)]
            for stage in trained
            if (path := folder / stage / CHANGES).is_file()
        },
        evaluations={
            name: _read(folder / "evaluation" / f"{name}.json", "evaluate", _EVALUATION)
            for name in MODELS
            if name not in left_out
        },
        command=read_text(command).strip() if command.is_file() else None,
        recipes={stage: recipe for stage in trained if (folder / (recipe := f"recipes/{stage}.yaml")).is_file()},
        stage_seconds={stage: marker["seconds"] for stage, marker in markers.items() if "seconds" in marker},
        contamination=_read(contamination, "data", _CONTAMINATION) if contamination.is_file() else None,
        heldout_overlap=manifest.get("heldout_overlap"),
        texts=manifest.get("sources", {}),
    )


def require_run(folder: Path) -> None:
    """Check that a folder is the folder of a pipeline run.

    Raises:
        UpcycleError: the folder is missing, or belongs to no pipeline run.
    """
    if not folder.is_dir():
        raise UpcycleError.no_path("run folder", folder)
    if not (folder / "pipeline.json").is_file():
        runs = sorted(str(path.parent) for path in folder.glob("*/pipeline.json"))
        raise UpcycleError(
            str(folder),
            kind="state",
            got="has no pipeline.json, so it is neither a pipeline run nor a grid",
            fix=f"name {' or '.join(runs[:3]) or 'the folder of a run or a grid'}",
        )


def read_settings(folder: Path, stage: str) -> dict[str, Any]:
    """Read the `training.json` of a training stage.

    Raises:
        UpcycleError: the file is missing or damaged.
    """
    return _read(folder / stage / "training.json", stage, _SETTINGS)


def read_manifest(folder: Path, markers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the data manifest of a run or a grid; empty if there is none.

    Args:
        folder: folder of the run or grid.
        markers: markers of the finished stages; None reads them.

    Raises:
        UpcycleError: the manifest is damaged.
    """
    manifest = data_folder(folder, read_markers(folder) if markers is None else markers) / MANIFEST
    return dict(_read(manifest, "data")) if manifest.is_file() else {}


def data_folder(folder: Path, markers: Mapping[str, Any]) -> Path:
    """Return the data folder of a run or a grid.

    Args:
        folder: folder of the run or grid.
        markers: markers of the finished stages.
    """
    return Path(markers.get("data", {}).get("outputs", {}).get("folder", folder / "data/blend"))


def read_markers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the markers of finished stages; each stage follows the stages that it needs."""
    markers = {path.parent.name: _read(path, path.parent.name) for path in sorted(folder.glob(f"*/{MARKER}"))}
    markers = {name: marker for name, marker in markers.items() if marker.get("stage") == name}  # omit suites
    needs = {
        name: [key.removeprefix("stage ") for key in marker.get("inputs", {}) if key.startswith("stage ")]
        for name, marker in markers.items()
    }
    ordered: dict[str, dict[str, Any]] = {}

    def add(name: str) -> None:
        for before in needs.pop(name, ()):
            add(before)
        if name in markers:
            ordered[name] = markers[name]

    needed = {name for names in needs.values() for name in names}
    for name in sorted(markers, key=lambda name: name in needed):
        add(name)
    return ordered


def read_training(folder: Path) -> Curve:
    """Read the metrics of a training stage, and of the branches that it had before it was rewound.

    Args:
        folder: folder of the stage.

    Raises:
        UpcycleError: see `read_curve`; or `lineage.json` is damaged.
    """
    curve, branches = read_curve(folder / METRICS), read_branches(folder)
    if len(branches) == 1:
        return curve
    earlier = {}
    for branch, after in pairwise(branches):
        if (path := folder / BRANCHES / str(branch.number) / METRICS).is_file():
            part = _from_step(read_curve(path), after.step)
            if part.steps and part.steps[-1]["step"] > after.step:
                earlier[branch.number] = part
    return replace(curve, branches=branches, earlier=earlier)


def _from_step(curve: Curve, step: int) -> Curve:
    """Return the part of a curve from a step on."""
    tokens = step * curve.step_tokens
    steps = [line for line in curve.steps if line["step"] >= step]
    return Curve(steps, [(at, loss) for at, loss in curve.validation if at >= tokens])


def read_curve(path: Path) -> Curve:
    """Read the `metrics.jsonl` of a training stage.

    A validation loss is either part of its step's line, or has a separate line without a token count.

    Raises:
        UpcycleError: a line is not JSON or lacks a number, or there is no training step.
    """
    lines = []
    for where, line in read_json_lines(path):
        wanted = _STEP if line.get("loss") is not None else _STEP[:1]
        optional = [key for key in _NUMBERS if line.get(key) is not None]
        if not all(isinstance(line.get(key), int | float) for key in (*wanted, *optional)):
            raise UpcycleError(
                where,
                kind="state",
                got=(
                    f"is not a JSON object with numbers ({', '.join(dict.fromkeys((*wanted, *optional)))}): "
                    f"{str(line)[:80]}"
                ),
                fix=f"delete the line, or run stage '{path.parent.name}' again",
            )
        lines.append(line)
    steps = [line for line in lines if line.get("loss") is not None]
    if not steps:
        raise UpcycleError(
            str(path), kind="state", got="has no step with a loss", fix=f"run stage '{path.parent.name}' again"
        )
    step_tokens = Curve(steps, []).step_tokens
    validation = [
        (line.get("tokens", line["step"] * step_tokens), line["validation_loss"])
        for line in lines
        if line.get("validation_loss") is not None
    ]
    scored = [line for line in lines if line.get("evaluation", {}).get(BITS)]
    return Curve(steps, validation, [(line["step"] * step_tokens, *_bits(line)) for line in scored])


def _bits(line: dict[str, Any]) -> tuple[float, float | None]:
    """Return the bits per byte of a line's evaluation, and half of its 95 % interval."""
    score, documents = line["evaluation"][BITS], sum(of["documents"] for of in line.get("sources", {}).values())
    error = error_of(score["stderr"], documents)
    return score["value"], half_width(error) if error else None


def _read(path: Path, stage: str, keys: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Read a JSON object that a stage wrote, and check that it has the given keys with the given types."""
    value = read_json(_made_by(stage, path))
    if not isinstance(value, dict):
        keys, value = {"JSON object": dict}, {}
    require_known(value, path)
    wrong = [key for key, kind in keys.items() if not isinstance(value.get(key), kind)]
    if wrong:
        actual = value.get(wrong[0])
        raise UpcycleError(
            str(path),
            kind="state",
            got=f"has no {wrong[0]}"
            if actual is None
            else f"has an invalid value of {wrong[0]}: {str(actual)[:80]!r}",
            fix=f"run stage '{stage}' again: delete {path} and its marker, then run the pipeline with the same dir",
        )
    return value


def _made_by(stage: str, path: Path) -> Path:
    if not path.is_file():
        raise UpcycleError(
            str(path),
            kind="missing",
            got=f"does not exist, and stage '{stage}' writes it",
            fix=f"run the pipeline again with the same dir: it resumes with stage '{stage}'",
        )
    return path
