"""A run that an earlier release finished, and the refusals that users meet in its folder: each fix must work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.checks import check_started
from nemo_upcycle.pipeline.forecast.stages import find
from nemo_upcycle.pipeline.order import chosen_stages, finished, read_plan, require_earlier, require_same_work
from nemo_upcycle.pipeline.stages import STAGES, RunPlan
from nemo_upcycle.utils.files import MARKER, STARTED, read_json, write_json
from tests.started import PACKED, unpack


NAMES = [stage.name for stage in STAGES]
#: Files and folders that each stage leaves in the run's folder.
LEFT = {"data": ["data/blend"], "upcycle": ["upcycle/hf", "receipt.json"], "pretrain": ["pretrain/checkpoints"]}
LEFT |= {"export": ["hf"], "evaluate": ["evaluation", "suite"]}


@pytest.fixture(scope="module", params=PACKED)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked run of a release; do not modify."""
    return unpack(request.param, tmp_path_factory.mktemp("started"))


def kept_of(run_dir: Path) -> Path:
    """Return the folder of the unchanged copy of the run."""
    return run_dir.parent.with_name("kept") / run_dir.name


@pytest.fixture
def run_dir(packed: Path) -> Iterable[Path]:
    """A run that a test may change. It is at its original path, because paths are settings."""
    root, kept = packed.parent, kept_of(packed).parent
    shutil.copytree(root, kept)
    yield packed
    shutil.rmtree(root)
    kept.rename(root)


@pytest.fixture
def plan(packed: Path) -> RunPlan:
    found = read_plan(packed)
    assert isinstance(found, RunPlan)
    return found


def launch(run_dir: Path, plan: RunPlan, first: str | None = None) -> list[str]:
    """Check a run as its command does, run the stages that are not done, and return their names.

    Raises:
        UpcycleError: the run is refused, now or when a stage starts.
    """
    stages = chosen_stages(first, None, None)
    check_started(run_dir, plan)
    require_earlier(stages, run_dir, plan)
    findings: dict[str, Any] = {}
    for stage in stages:
        findings[stage.name] = find(stage, run_dir, plan, findings)
    plan.write(run_dir)
    ran = []
    for stage in stages:
        if not stage.is_done(run_dir, plan):
            folder, inputs = stage.folder(run_dir, plan), stage.inputs(run_dir, plan)
            if stage.resumable:
                require_same_work(run_dir, plan)
            folder.start(inputs, resumable=stage.resumable)
            outputs = read_json(kept_of(run_dir) / stage.name / MARKER)["outputs"]
            for name in LEFT.get(stage.name, ()):
                if not (run_dir / name).exists():
                    source = kept_of(run_dir) / name
                    (shutil.copytree if source.is_dir() else shutil.copy)(source, run_dir / name)
            folder.finish(inputs, 1.0, outputs, stage.content_of(run_dir, plan, outputs))
            ran.append(stage.name)
    assert finished(run_dir, plan) == NAMES
    return ran


def damage(*paths: str) -> Callable[[Path], None]:
    return lambda run_dir: [(run_dir / path).write_text("{") for path in paths] and None


def lose(*paths: str) -> Callable[[Path], None]:
    def delete(run_dir: Path) -> None:
        for path in paths:
            shutil.rmtree(run_dir / path) if (run_dir / path).is_dir() else (run_dir / path).unlink()

    return delete


def test_a_finished_earlier_run_has_nothing_to_do(run_dir: Path, plan: RunPlan) -> None:
    assert finished(run_dir, plan) == NAMES
    assert launch(run_dir, plan) == []
    assert {read_json(run_dir / name / MARKER)["schema"] for name in NAMES} == {1}


def test_a_setting_that_left_changes_no_stage(run_dir: Path, plan: RunPlan) -> None:
    write_json(run_dir / plan.file, read_json(run_dir / plan.file) | {"trained_on": "300B"})
    for name in (MARKER, STARTED):
        notes = read_json(run_dir / "report" / name)
        notes["inputs"]["setting trained_on"] = "300B"
        write_json(run_dir / "report" / name, notes)
    started = read_plan(run_dir)
    assert isinstance(started, RunPlan)
    assert launch(run_dir, started) == []


#: Changes that a user makes to the folder, and the stages that run again.
CHANGES: list[tuple[Callable[[Path], None], list[str]]] = [
    (lose("export", "hf", "evaluate", "evaluation", "report"), ["export", "evaluate", "report"]),
    (lose(f"upcycle/{MARKER}", "upcycle/hf"), ["upcycle"]),
    (damage(*(f"{name}/{MARKER}" for name in NAMES)), NAMES),
    (lose("import", "data"), ["import", "data"]),
    # The report reads neither the checkpoints nor the tokens.
    (lose("pretrain/checkpoints", "data/blend/tokens", "report"), ["report"]),
]


@pytest.mark.parametrize(("change", "ran"), CHANGES)
def test_a_stage_without_marker_or_results_runs_again(
    run_dir: Path, plan: RunPlan, change: Callable[[Path], None], ran: list[str]
) -> None:
    change(run_dir)
    assert launch(run_dir, plan) == ran


@pytest.mark.parametrize(
    ("path", "lost", "stage"),
    [
        ("data/blend/tokens", "data", "pretrain"),
        ("upcycle/hf", "upcycle", "evaluate"),
        ("pretrain/checkpoints", "pretrain", "export"),
        ("hf/config.json", "export", "evaluate"),
    ],
)
def test_lost_outputs_are_refused_with_the_stage_to_run_again(
    run_dir: Path, plan: RunPlan, path: str, lost: str, stage: str
) -> None:
    only = chosen_stages(None, None, stage)
    lose(f"{stage}/{MARKER}")(run_dir)
    require_earlier(only, run_dir, plan)
    lose(path)(run_dir)
    with pytest.raises(UpcycleError) as refused:
        require_earlier(only, run_dir, plan)
    assert refused.value.subject == f"Stage '{stage}'"
    assert f"of stage '{lost}' in {run_dir}: " in str(refused.value.got)
    assert f"--from {lost}" in refused.value.fix


def test_export_resumes_without_the_check_of_step_0(run_dir: Path, plan: RunPlan) -> None:
    lose("upcycle", "export", "hf")(run_dir)
    require_earlier(chosen_stages(None, None, "export"), run_dir, plan)
    with pytest.raises(UpcycleError, match="--from upcycle"):  # evaluate reads the model of upcycle
        require_earlier(chosen_stages("export", None, None), run_dir, plan)
    assert launch(run_dir, plan, "upcycle") == ["upcycle", "export"]


def changed_plan(plan: RunPlan, **changes: str) -> RunPlan:
    """Return a plan with other fields. The plan keeps the recipes' facts, because loading recipes needs NeMo."""
    changed = replace(plan, **changes)
    changed._known.update(plan._known)
    return changed


def touch_parent(run_dir: Path) -> None:
    """Change the parent's weights in place, and delete the import stage so that it runs again."""
    weights = run_dir.parent / "parent/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    lose("import")(run_dir)


#: Changes of a plan: another parent, on which all trainings depend, and another suite.
OTHER_PARENT, OTHER_SUITE = {"dense": "/other/parent"}, {"evaluation": "demo"}


@pytest.mark.parametrize(
    ("change", "changed", "first", "fix"),
    [
        (damage("data/_STARTED.json"), {}, None, "delete"),
        (damage("pretrain/_STARTED.json"), {}, None, "delete folder"),
        (None, OTHER_PARENT, None, "delete"),
        (None, OTHER_PARENT, None, "back"),
        (touch_parent, {}, None, "delete"),
        (lose("data"), {}, "export", "from"),
        (None, OTHER_SUITE, "report", "from"),
        (lose("export", "data/blend/manifest.json", "data/blend/_SUCCESS.json"), {}, "export", "delete"),
    ],
)
def test_whoever_does_what_a_refusal_says_goes_on(
    run_dir: Path,
    plan: RunPlan,
    change: Callable[[Path], None] | None,
    changed: dict[str, str],
    first: str | None,
    fix: str,
) -> None:
    lose(*NAMES)(run_dir)
    launch(run_dir, plan)  # run all stages, so that each records its outputs
    if change:
        change(run_dir)
    tried = changed_plan(plan, **changed)
    with pytest.raises(UpcycleError) as refused:
        launch(run_dir, tried, first)
    text = refused.value.fix
    if fix == "back":
        launch(run_dir, plan, first)
        return
    if fix.startswith("delete"):
        paths = re.findall(rf"{re.escape(str(run_dir))}[\w./]*\w", text)
        if refused.value.subject.endswith("_STARTED.json"):
            paths = [refused.value.subject] if fix == "delete" else paths
        for path in map(Path, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if start := re.search(r"--from (\w+)", text):
        first = start[1]
    launch(run_dir, tried, first)


def test_a_run_of_a_newer_release_is_refused_by_name(run_dir: Path, plan: RunPlan) -> None:
    write_json(run_dir / plan.file, read_json(run_dir / plan.file) | {"schema": 2})
    with pytest.raises(UpcycleError) as refused:
        read_plan(run_dir)
    assert refused.value.subject == f"schema of {run_dir / plan.file}"


def test_plans_are_the_same_by_what_stages_are_made_from(run_dir: Path, plan: RunPlan) -> None:
    """Jobs that an earlier release submitted with its own wording of the recipes can still be watched."""
    assert changed_plan(plan, recipe="renamed").is_as(plan)
    assert not changed_plan(plan, **OTHER_SUITE).is_as(plan)
