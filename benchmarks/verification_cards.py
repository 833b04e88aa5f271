"""Cards in the form of Megatron-Bridge's model verification cards, from what the tests of Bridge's side really ran.

    make test-in ENV=bridge && python -m benchmarks.verification_cards runs/test-bridge/*.xml

An item is `verified` in NVIDIA's sense only when its command ran on the model itself, on the named hardware. These
tests run small models of the same architecture without a GPU, so every item says `unverified`, which tests stand
behind it, and what they found. Form: examples/model_verification_cards of Megatron-Bridge.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import yaml


RESULTS = Path(__file__).parent / "results" / "verification_cards"
DISCLAIMER = (
    "Performance disclaimer: this model has not been performance-tuned; reported timing and throughput metrics are "
    "sanity checks, not optimized performance results."
)
MODEL_LEVEL = [
    "hf_to_megatron_cpu",
    "hf_to_megatron_gpu",
    "megatron_to_hf_cpu",
    "megatron_to_hf_gpu",
    "manual_forward_pass",
    "inference",
]


@dataclass(frozen=True)
class Model:
    """One upcycled model: its parent on the hub, the class that it is exported as, its recipe."""

    parent: str
    architecture: str
    recipe: str


MODELS = {
    "llama3_8b_e8t2": Model(
        "meta-llama/Meta-Llama-3-8B", "MixtralForCausalLM", "llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config"
    ),
    "qwen3_8b_e8t2": Model(
        "Qwen/Qwen3-8B-Base", "Qwen3MoeForCausalLM", "qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_config"
    ),
}

_FILL = (
    "tests.te.test_upcycle::test_every_kind_of_model",
    "tests.bridge.test_upcycling::test_the_checkpoint_has_the_bits_of_an_offline_conversion",
)
_EXPORT = (
    "tests.bridge.test_upcycling::test_the_checkpoint_has_the_bits_of_an_offline_conversion",
    "tests.bridge.test_live_export::test_bridge_exports_of_a_run_have_the_bits_of_convert",
)
#: The tests that run what an item is about, on small models: NVIDIA's twelve items.
ITEMS = {
    "hf_to_megatron_cpu": _FILL,
    "hf_to_megatron_gpu": (),
    "megatron_to_hf_cpu": _EXPORT,
    "megatron_to_hf_gpu": (),
    "manual_forward_pass": ("tests.bridge.test_chain::test_step_0_is_checked_on_one_rank_whatever_the_layout",),
    "inference": (),
    "pretrain": ("tests.bridge.test_recipes::test_torchrun_starts_a_recipe_by_the_planners_command",),
    "sft": ("tests.bridge.test_finetuning::test_finetuning_starts_with_the_weights_and_the_vocabulary_of_the_run",),
    "sft_export_inference": (),
    "sft_long_context": (),
    "peft": (),
    "checkpoint_resume": (
        "tests.bridge.test_upcycling::test_a_second_start_in_the_same_process_is_not_upcycled_again",
        "tests.contract.test_training::test_a_killed_run_ends_with_the_bits_of_one_that_was_not_stopped",
    ),
}
_AFTER = {"sft_export_inference": "sft", "checkpoint_resume": "pretrain"}
_METRICS = (
    "initial_loss",
    "final_loss",
    "last_10_steps_step_time_ms_avg",
    "last_10_steps_model_tflops_per_gpu_avg",
    "last_10_steps_tokens_per_second_per_gpu_avg",
)
_NO_COMPARISON = {
    "reference_item": "pretrain",
    "sentinel_steps": None,
    "loss_relative_tolerance": 0.001,
    "loss_absolute_tolerance": 0.001,
    "sentinels_match": None,
}


def _outcomes(reports: list[Path]) -> dict[str, tuple[int, int]]:
    """Return, of every test function in pytest's XML, how many of its cases passed and how many did not."""
    found: dict[str, tuple[int, int]] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name', '').split('[')[0]}"
            failed = any(child.tag in ("failure", "error", "skipped") for child in case)
            passed, others = found.get(name, (0, 0))
            found[name] = (passed + (not failed), others + failed)
    return found


def _behind(tests: tuple[str, ...], outcomes: dict[str, tuple[int, int]], day: date) -> str:
    """Summarise the results of the tests behind an item."""
    if not tests:
        return "Not run: no GPU has run it, and no test without one is about it."
    lines = []
    for test in tests:
        passed, others = outcomes.get(test, (0, 0))
        name = test.replace(".", "/").replace("::", ".py, ")
        count = f"{passed} passed" if passed else "not run"
        lines.append(f"{name}: {count}" + (f", {others} failed or skipped" if others else ""))
    return f"Not run on this model. Small models of its architecture, no GPU, {day}: " + "; ".join(lines) + "."


def card(name: str, model: Model, outcomes: dict[str, tuple[int, int]], day: date) -> dict[str, object]:
    """Return one model's card: every item unverified, with what stands behind it."""
    items: dict[str, object] = {}
    for item, tests in ITEMS.items():
        leaf: dict[str, object] = {"status": "unverified", "precision": "bf16", "last_verified": None}
        leaf["commands" if item == "sft_export_inference" else "command"] = None
        leaf["expected_result"] = _behind(tests, outcomes, day)
        if item in _AFTER:
            leaf["depends_on"] = _AFTER[item]
        if item in ("pretrain", "sft", "sft_long_context", "peft"):
            leaf["enabled_features"] = {}
        if item not in MODEL_LEVEL and item != "sft_export_inference":
            leaf["metrics"] = dict.fromkeys(_METRICS)
        if item == "checkpoint_resume":
            leaf["resume_comparison"] = _NO_COMPARISON
        items[item] = leaf if item in MODEL_LEVEL else {"H100": leaf}
    training = [item for item in ITEMS if item not in MODEL_LEVEL]
    return {
        "title": name,
        "summary": f"{DISCLAIMER} Upcycled from {model.parent} by nemo-upcycle; its recipe is {model.recipe}.",
        "verification_index": {
            "model_level": {"unverified": MODEL_LEVEL},
            "training": {"H100": {"unverified": training}},
        },
        "model": {
            "hf_id": model.parent,
            "hf_revision": None,
            "architecture": model.architecture,
            "min_transformers_version": "5.8.1",
        },
        "verification_environment": {"base_container": None, "bridge_commit": None},
        "items": items,
    }


def main() -> None:
    """Write the cards of all models from pytest's reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="what pytest wrote with --junitxml")
    outcomes = _outcomes(parser.parse_args().reports)
    for name, model in MODELS.items():
        path = RESULTS / name / "card.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(card(name, model, outcomes, date.today()), sort_keys=False, width=110))
        print(path)


if __name__ == "__main__":
    main()
