"""The forecast says which stages need a network and for what, and nothing that the caches of their jobs have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.demo.assets import asset_folder
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.settings import cluster_for, read_executor
from nemo_upcycle.pipeline.forecast.network import forecast_network
from nemo_upcycle.pipeline.stages import STAGES, RunPlan
from nemo_upcycle.utils.files import MARKER, write_json
from tests.models import write_llama


DEMO = RunPlan("tiny", "asset://smollm2-135m", "sotu", "demo", "", None)
JOBS = {stage.name: Job(stage.name, Path("/runs/tiny"), ("python",)) for stage in STAGES}


def _names(plan: RunPlan, *site: str) -> dict[str, list[str]]:
    """List what each stage takes from networks, on this machine or on a Slurm cluster."""
    cluster = cluster_for(read_executor("slurm", ["account=a", "partition=b", *site])) if site else None
    stages = forecast_network(STAGES, plan, cluster, JOBS).stages
    return {stage: [name for names in places.values() for name in names] for stage, places in stages.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of this machine's environment."""
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.mark.parametrize("trainer", ["nemo", "bridge"])
def test_the_demo_needs_its_assets_until_the_cache_has_them(cache: Path, trainer: str) -> None:
    plan = replace(DEMO, trainer=trainer)
    assert _names(plan) == {
        "import": ["model smollm2-135m"],
        "data": ["corpus sotu", "questions mmlu"],
        "evaluate": ["questions mmlu"],
    }
    for name in ("smollm2-135m", "mmlu"):
        write_json(asset_folder(name, cache) / MARKER, {})
    assert _names(plan) == {"data": ["corpus sotu"]}
    assert list(cache.iterdir()) == [cache / "assets"]


def test_a_job_finds_what_its_own_variables_name(cache: Path, tmp_path: Path) -> None:
    for name in ("smollm2-135m", "sotu", "mmlu"):
        write_json(asset_folder(name, cache) / MARKER, {})
    image = "container_image=a"
    assert _names(DEMO, "container_image=null") == {}
    assert list(_names(DEMO, image)) == ["import", "data", "evaluate"]  # nobody mounts the user's home
    assert _names(DEMO, image, f"env_vars={{NEMO_UPCYCLE_CACHE: {cache}}}") == {}
    assert list(_names(DEMO, "container_image=null", f"env_vars={{NEMO_UPCYCLE_CACHE: {tmp_path}}}")) == list(
        _names(DEMO, image)
    )


def test_a_model_of_the_hub_is_needed_until_all_of_it_is_there(cache: Path, tmp_path: Path) -> None:
    plan = replace(DEMO, dense="hf://acme/tiny", data=str(tmp_path), evaluation="laptop")
    assert _names(plan) == {"import": ["model acme/tiny"]}
    kept = tmp_path / "hf/hub/models--acme--tiny"
    weights = write_llama(kept / "snapshots" / ("c" * 40), layers=1) / "model.safetensors"
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("c" * 40)
    assert _names(plan) == {}
    weights.unlink()
    assert _names(plan) == {"import": ["model acme/tiny"]}


def test_what_was_fetched_beforehand_is_not_needed(cache: Path) -> None:
    plan = replace(DEMO, data="fineweb_edu_academic_7_3", evaluation="paper")
    assert {"lm-eval's drop", "lm-eval's piqa"} <= set(_names(plan)["data"])
    assert "lm-eval's drop" not in _names(plan)["evaluate"]
    write_json(cache / "fetched.json", {"fetched": {"lm-eval's piqa": {}}})
    assert "lm-eval's piqa" not in _names(plan)["data"]
