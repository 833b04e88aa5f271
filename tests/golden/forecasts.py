"""The output of `nemo upcycle pipeline --dryrun` for several recipes on every executor, the same on every machine.

Each file ends with the output of `--render`. The files of `IN_FULL` have a `--verbose` forecast and complete scripts.
In the other files, each script is one line with the hash of the script.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

from tests.golden import FOLDER


def _cluster(name: str, *site: str) -> Any:
    from nemo_upcycle.pipeline.executors.site_file import cluster_for, read_executor

    return cluster_for(read_executor(name, site))


#: Executor -> function that returns the executor's cluster, or None for this machine.
CLUSTERS: dict[str, Callable[[], Any]] = {
    "here": lambda: None,
    "slurm": lambda: _cluster("slurm", "account=me", "partition=h100", "container_image=nemo", "price_per_gpu_hour=3"),
    "kubernetes": lambda: _cluster(
        "kubernetes", "image=nemo", "claim=runs", "mount_path=/runs", "queue=batch", "run_as=1000:1000"
    ),
}
RECIPES = ("llama3_8b_e8t2", "llama31_8b_e8t2", "llama3_70b_e8t2", "qwen3_8b_e8t2", "smollm2_135m_e8t2")
GOLDEN = [(recipe, cluster) for recipe in RECIPES for cluster in CLUSTERS]
#: Recipe and executor of the complete files. `here` is missing, because a chain on this machine has no scripts.
IN_FULL = (("llama3_8b_e8t2", "slurm"), ("llama3_8b_e8t2", "kubernetes"))
FREE_BYTES = 4 << 40
NOW = datetime(2026, 12, 1, 12)


def forecast_path(recipe: str, cluster: str) -> Path:
    """Return the golden file of a recipe's chain on an executor."""
    return FOLDER / "forecast" / f"{recipe}-{cluster}.txt"


def forecast_text(recipe: str, cluster: str) -> str:
    """Return the expected content of a golden file."""
    from nemo_upcycle import recipes
    from nemo_upcycle.pipeline.forecast.text import render_forecast
    from nemo_upcycle.trainers.nemo import recipe_parts

    # The demo's recipes depend on the machine's GPU and fast BF16, and a forecast depends on the machine's caches.
    with (
        mock.patch.dict("os.environ", {"NEMO_UPCYCLE_CACHE": "/nowhere", "HF_HOME": "/nowhere"}),
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch.object(recipe_parts, "cpu_has_fast_bf16", return_value=True),
    ):
        chain = getattr(recipes, recipe).pipeline_recipe(dir=f"/runs/{recipe}")
        run_dir, site, is_full = Path(chain.dir), CLUSTERS[cluster](), (recipe, cluster) in IN_FULL
        found = forecast_of(chain, run_dir, site)
        rendered = {job.folder: site.masked().render(job) for job in jobs_of_chain(chain, run_dir)} if site else {}
    disk = replace(found.disk, folder=Path("/runs"), free_bytes=FREE_BYTES)
    found = replace(found, disk=disk, now=NOW)
    lines = [render_forecast(found, verbose=is_full), *([""] if rendered and not is_full else [])]
    for folder, scripts in rendered.items():
        for name, script in scripts.items():
            body = script.rstrip("\n")
            count, digest = len(body.split("\n")), hashlib.sha256(body.encode()).hexdigest()
            about = f"--- {folder / name}: {count} lines, sha256 {digest[:16]}..."
            lines += ["", f"--- {folder / name}", body] if is_full else [about]
    return "\n".join(lines) + "\n"


def forecast_of(chain: Any, run_dir: Path, cluster: Any = None, stages: Any = None, typed: Any = None) -> Any:
    """Return the forecast of a chain.

    Args:
        chain: configuration of a pipeline, as a recipe's `pipeline_recipe` returns it.
        run_dir: folder of the run.
        cluster: cluster that runs the chain, None for this machine.
        stages: stages to forecast, None for all.
        typed: argument or setting that the user typed -> its value.
    """
    from nemo_upcycle.pipeline.forecast.run import forecast
    from nemo_upcycle.pipeline.stages import STAGES

    stages, plan = stages or STAGES, plan_of(chain)
    return forecast(stages, run_dir, plan, cluster, jobs_of_chain(chain, run_dir), typed)


def jobs_of_chain(chain: Any, run_dir: Path) -> list[Any]:
    """Return the jobs of all stages of a chain, as the pipeline makes them for a container."""
    from nemo_upcycle.pipeline.stage_jobs import jobs_of
    from nemo_upcycle.pipeline.stages import STAGES

    return jobs_of(STAGES, run_dir, plan_of(chain), "python")


def plan_of(chain: Any) -> Any:
    """Return the plan that the pipeline makes from a chain."""
    from nemo_upcycle.pipeline.stages import RunPlan
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe

    dense_ct = dump_recipe(chain.dense_ct) if chain.dense_ct else None
    recipes = dump_recipe(chain.pretrain), dense_ct
    return RunPlan(chain.pretrain.log.name, chain.dense, chain.data, chain.evaluation, *recipes)
