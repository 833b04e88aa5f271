"""Megatron-Bridge's own `pretrain` upcycles the model at the first start of a run, and only then, on several ranks."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.trainers.paper import high_rate
from nemo_upcycle.utils.conf import read_yaml
from nemo_upcycle.utils.files import read_json
from nemo_upcycle.utils.progress import show_messages
from tests.bridge.runs import (
    SPEC,
    VOCABULARY,
    bridges_pretrain,
    ends_as_converted,
    hooked,
    refusal,
    run_config,
    train,
    train_on_ranks,
)
from tests.distributed.ranks import run_ranks
from tests.models import write_llama


MIXED = SPEC | {"moe_layers": "every-2"}


@pytest.mark.parametrize(
    ("style", "fields", "layout"),
    [
        ("provider", SPEC, {"tp": 2}),
        ("provider", SPEC, {"pp": 2, "vp": 2}),
        ("provider", SPEC, {"ep": 4}),
        ("provider", SPEC, {"tp": 4, "ep": 4, "etp": 1}),  # two ranks share a key-value head
        ("provider", MIXED, {"pp": 2}),
        ("builder", SPEC, {"ep": 2}),
        ("builder", MIXED, {"pp": 2}),
    ],
    ids=str,
)
def test_the_checkpoint_has_the_bits_of_an_offline_conversion(
    dense: Path, tmp_path: Path, style: str, fields: dict[str, Any], layout: dict[str, int]
) -> None:
    assert ends_as_converted(dense, tmp_path / "run", fields, style=style, **layout)
    assert (tmp_path / "run/receipt.json").is_file()


@pytest.mark.parametrize("style", ["provider", "builder"])
def test_a_second_start_does_not_upcycle_again(dense: Path, tmp_path: Path, style: str) -> None:
    """As in an in-process restart, the hook that filled the model runs again, after the dense weights are deleted."""
    parent = write_llama(tmp_path / "parent", tied=True, vocab_size=VOCABULARY)
    assert ends_as_converted(dense, tmp_path / "run", SPEC, parent=parent, starts=2, style=style)
    assert (tmp_path / "run/iter_0000002").is_dir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "not made by upcycling"),
        (lambda path: path.write_text(path.read_text()[:100]), "receipt.json"),
        (
            lambda path: path.write_text(path.read_text().replace('"top_k": 2', '"top_k": 3')),
            r"the run started: \{'top_k': 3\} became \{'top_k': 2\}",
        ),
        (lambda path: path.write_text(path.read_text().replace("/dense", "/other")), "same source"),
    ],
    ids=["none", "half", "another spec", "another parent"],
)
def test_a_run_of_another_origin_is_refused(dense: Path, tmp_path: Path, damage: Any, message: str) -> None:
    train_on_ranks(1, dense, tmp_path / "run", SPEC)
    damage(tmp_path / "run/receipt.json")
    with pytest.raises(RuntimeError, match=message):
        train_on_ranks(1, dense, tmp_path / "run", SPEC, steps=2)
    assert not (tmp_path / "run/iter_0000002").exists()


def test_the_dense_baseline_starts_from_the_same_checkpoint(dense: Path, tmp_path: Path) -> None:
    assert ends_as_converted(dense, tmp_path / "run", None, tp=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.moe_router_topk": 1}, "moe_router_topk"),
        ({"checkpoint.load": None}, "checkpoint.load"),
        ({"checkpoint.save": None}, "checkpoint.save"),
        ({"checkpoint.pretrained_checkpoint": "/models/other"}, "pretrained_checkpoint"),
        ({"checkpoint.finetune": True}, "checkpoint.finetune"),
        ({"dist.use_megatron_fsdp": True}, "use_megatron_fsdp"),
        ({"dist.use_decentralized_pg": True}, "use_decentralized_pg"),
        ({"checkpoint.non_persistent_ckpt_type": "local"}, "non_persistent_ckpt_type"),
        (
            {"model.tensor_model_parallel_size": 3},
            "vocab_size is 256; expected a multiple of tensor_model_parallel_size",
        ),
        ({"model.init_model_with_meta_device": True}, "init_model_with_meta_device"),
        ({"checkpoint.save": "msc://mine/run", "checkpoint.load": "msc://mine/run"}, "MultiStorageClient is on"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_is_refused_by_name(
    dense: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert message in refusal(dense, tmp_path, SPEC, change)


@pytest.mark.parametrize(
    "precision", ["bf16_with_fp8_delayed_scaling_mixed", "bf16_with_mxfp8_mixed", "bf16_with_nvfp4_mixed"]
)
def test_a_run_may_keep_its_parameters_in_fp8_or_fp4(dense: Path, tmp_path: Path, precision: str) -> None:
    """With FP8 parameters and delayed scaling, only 8-bit master weights are refused."""
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    from nemo_upcycle.trainers.bridge.upcycling import check

    config = hooked(dense, tmp_path, SPEC)
    config.mixed_precision = get_mixed_precision_config(precision)
    kind = "fp4" if "nvfp4" in precision else "fp8"
    setattr(config.mixed_precision, f"{kind}_param_gather", True)
    config.mixed_precision.setup(config.model, config.optimizer, config.ddp)
    assert getattr(config.model, f"{kind}_param")
    check(config)
    if config.mixed_precision.fp8_recipe == "delayed" and kind == "fp8":
        config.optimizer.use_precision_aware_optimizer = True
        with pytest.raises(SpecError, match="use_precision_aware_optimizer is True; expected False with fp8_param_"):
            check(config)


def test_a_parent_that_is_not_there_is_refused(dense: Path, tmp_path: Path) -> None:
    from nemo_upcycle.bridge import with_upcycling

    with pytest.raises(UpcycleError, match="No model folder /models/none"):
        with_upcycling(run_config(dense, tmp_path, UpcycleSpec(**SPEC)), "/models/none", **SPEC)


@pytest.mark.parametrize("has_source", [False, True])
def test_bridges_own_export_wants_a_folder_of_the_models_class(dense: Path, tmp_path: Path, has_source: bool) -> None:
    """Given the parent's folder, Bridge would write a model without experts and show no warning."""
    changes = {"checkpoint.also_save_hf_checkpoint": True, "tokenizer.tokenizer_model": str(dense)}
    changes |= {"checkpoint.hf_source_path": str(dense) if has_source else None}
    said = refusal(dense, tmp_path, SPEC, changes)
    assert "hf_source_path is " in said
    assert "expected a folder with 4 experts" in said


def test_bridges_own_provider_loses_the_hook_that_loads_weights(dense: Path, tmp_path: Path) -> None:
    from megatron.bridge import AutoBridge

    from nemo_upcycle.bridge import with_upcycling
    from nemo_upcycle.trainers.bridge.hooks import pre_wrap_hooks

    config = run_config(dense, tmp_path, None)
    config.model = AutoBridge.from_hf_pretrained(str(dense)).to_megatron_provider()
    assert len(pre_wrap_hooks(config.model)) == 1
    model = with_upcycling(config, dense, **SPEC).model
    assert [hook.func.__name__ for hook in pre_wrap_hooks(model)] == ["refuse_unfilled"]


@pytest.mark.parametrize("style", ["provider", "builder"])
def test_bridges_overrides_change_the_node_and_the_model_follows(dense: Path, tmp_path: Path, style: str) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from nemo_upcycle.trainers.bridge.upcycling import prepare

    config = hooked(dense, tmp_path, SPEC, style=style)
    typed = ["upcycling.num_experts=8", "upcycling.top_k=4", "upcycling.moe_layers=every-2"]
    typed.append(f"model.{'transformer.' if style == 'builder' else ''}expert_model_parallel_size=2")
    config = process_config_with_overrides(config, cli_overrides=typed)
    prepare(config)
    model = config.model
    assert (model.num_moe_experts, model.moe_router_topk, model.expert_model_parallel_size) == (8, 4, 2)
    assert model.moe_layer_freq == [1, 0, 1, 0]


def test_the_node_stands_in_the_saved_configuration(dense: Path, tmp_path: Path) -> None:
    train_on_ranks(1, dense, tmp_path / "run", SPEC)
    saved = read_yaml(tmp_path / "run/iter_0000001/run_config.yaml")
    assert saved["upcycling"].items() >= (SPEC | {"hf_model_path": str(dense), "method": "copy"}).items()


def test_a_run_whose_node_is_lost_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"config.model has no weights of .*dense"):
        run_ranks(_train_without_node, 1, dense, tmp_path / "run", process_group=False)


def _train_without_node(dense: Path, folder: Path) -> None:
    from dataclasses import fields

    pretrain = bridges_pretrain()
    from megatron.bridge.training.config import ConfigContainer

    config = hooked(dense, folder, SPEC)
    pretrain(ConfigContainer(**{one.name: getattr(config, one.name) for one in fields(ConfigContainer) if one.init}))


def test_a_copy_of_a_run_fills_its_own_model(dense: Path, tmp_path: Path) -> None:
    from nemo_upcycle.trainers.bridge.hooks import pre_wrap_hooks
    from nemo_upcycle.trainers.bridge.upcycling import UpcycleHook, prepare

    config = hooked(dense, tmp_path, SPEC)
    prepare(config)
    copied = copy.deepcopy(config)
    prepare(copied)
    for run in (config, copied):
        (hook,) = (one.__self__ for one in pre_wrap_hooks(run.model) if hasattr(one, "__self__"))
        assert isinstance(hook, UpcycleHook)
        assert hook.config is run


def test_paths_are_compared_resolved(dense: Path, tmp_path: Path) -> None:
    """A run resumes if its parent is named by a symbolic link and its folder by a relative path."""
    link = tmp_path / "link"
    link.symlink_to(dense)
    train_on_ranks(1, link, tmp_path / "run", SPEC)
    train_on_ranks(1, dense, tmp_path / "run", SPEC, steps=2, load=os.path.relpath(tmp_path / "run"))
    assert (tmp_path / "run/iter_0000002").is_dir()


def test_a_parent_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    parent = write_llama(tmp_path / "parent", tied=True, vocab_size=VOCABULARY)
    train_on_ranks(1, parent, tmp_path / "run", SPEC)
    shutil.rmtree(parent)
    write_llama(parent, tied=False, vocab_size=VOCABULARY)
    with pytest.raises(RuntimeError, match="source_files: got"):
        train_on_ranks(1, parent, tmp_path / "run", SPEC, steps=2)


def test_a_run_in_an_object_store_resumes(dense: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    profile = {"storage_provider": {"type": "file", "options": {"base_path": str(store)}}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": {"mine": profile}}))
    for steps in (1, 2):
        folder = tmp_path / f"from_{steps}"
        folder.mkdir()
        run_ranks(_train_in_store, 1, dense, tmp_path / "msc.json", folder, steps, process_group=False)
        assert list(folder.iterdir()) == []
    assert json.loads((store / "run/receipt.json").read_text())["spec"]["num_experts"] == 4
    assert (store / "run/iter_0000002").is_dir()


def _train_in_store(dense: Path, profiles: Path, folder: Path, steps: int) -> None:
    os.environ["MSC_CONFIG"] = str(profiles)
    os.chdir(folder)
    from megatron.core.msc_utils import MultiStorageClientFeature

    MultiStorageClientFeature.enable()
    train(dense, "msc://mine/run", SPEC, steps=steps)


def test_a_start_shows_its_schedule_and_likely_mistakes(dense: Path, tmp_path: Path) -> None:
    """Megatron's loss counts rows that only pad the vocabulary, so a padded model is not exact."""
    (said,) = run_ranks(_messages_of_a_run, 1, dense, tmp_path / "run", process_group=False)
    receipt = read_json(tmp_path / "run/receipt.json")
    (reason,) = receipt["inexact_because"]
    assert receipt["exact"] is False
    assert "256 padding rows of the vocabulary" in reason
    assert f"not the parent's function: {reason}" in said
    schedule = "1 steps of 4 sequences of 32 tokens; learning rate 0.0003 to 0.0003, cosine, 0 steps of warm-up"
    assert said.count(f"parent: {dense}") == said.count(schedule) == said.count(high_rate(3e-4)) == 1
    assert len([line for line in said if "mock data" in line]) == 1


def _messages_of_a_run(dense: Path, run: Path) -> list[str]:
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    show_messages().addHandler(Keep())
    train(dense, run, SPEC, vocab_size=2 * VOCABULARY, lr=3e-4)
    return said


def test_asynchronous_saving_is_refused_without_a_gpu(dense: Path, tmp_path: Path) -> None:
    """Otherwise Bridge ends with a ZeroDivisionError on one rank while the others wait."""
    with pytest.raises(RuntimeError, match=r"async_save is True; expected False without a GPU"):
        train_on_ranks(1, dense, tmp_path / "run", SPEC, async_save=True)


def test_refuses_settings_that_come_after_the_recipe(dense: Path, tmp_path: Path) -> None:
    """For example, `--save_dir` without a load folder: Bridge reads the command line after it built the recipe."""
    with pytest.raises(RuntimeError, match=r"checkpoint\.load is .*run; expected checkpoint\.save"):
        train_on_ranks(1, dense, tmp_path / "run", SPEC, save_later=tmp_path / "other")
    assert not (tmp_path / "other").exists()
