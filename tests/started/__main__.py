"""Make a small run in `/started` with the code of a release, and pack the run: `python -m tests.started FILE`."""

import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

from nemo_upcycle.pipeline.launch import _write_plan
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.recipes import smollm2_135m_e8t2
from nemo_upcycle.trainers.nemo.recipes import dump_recipe
from tests.functional import tiny
from tests.functional.stages import STAGES, run_in_own_process
from tests.started import PLACE


#: Smaller than the tiny model of other tests, because optimizer states cannot be compressed.
PARENT = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
MODEL = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24}
#: Files that a run does not need to resume.
LEFT_OUT = [
    "*.png",
    "*/report.html",
    "*/data/blend/build",
    "*.log",
    "*log_globalrank*",
    "*lightning_logs*",
    "*_log.txt",
]


def write_run(folder: Path) -> None:
    """Write the inputs of a run, and run all stages."""
    tiny.write_parent(folder / "parent", layers=2, **PARENT)
    tiny.write_texts(folder / "texts")
    (folder / "evaluation.yaml").write_text(tiny.EVALUATION.replace("WINDOWS", "4"))
    recipe = tiny.shrink(smollm2_135m_e8t2.pretrain_recipe(), max_steps=4, checkpoint_every=2)
    for name, value in MODEL.items():
        setattr(recipe.model.config, name, value)
    inputs = [str(folder / name) for name in ("parent", "texts/blend.yaml", "evaluation.yaml")]
    plan = RunPlan("smollm2_135m_e8t2", *inputs, dump_recipe(recipe), None)
    run_dir = folder / "run"
    run_dir.mkdir()
    _write_plan(run_dir, *plan.with_copies(run_dir))
    for stage in STAGES:
        answer = run_in_own_process(stage, run_dir)
        assert answer.status == 0, answer.text


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return None if any(fnmatch(entry.name, pattern) for pattern in LEFT_OUT) else entry


if __name__ == "__main__":
    write_run(Path(PLACE))
    with tarfile.open(sys.argv[1], "w:gz") as tar:
        tar.add(PLACE, ".", filter=_needed)
