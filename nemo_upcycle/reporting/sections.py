"""The sections of report.md, each a function of the results that names the files of its numbers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from nemo_upcycle.reporting.markdown import code, fenced, millions, number, plain, section, sources, table
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.progress import duration


def command(results: dict[str, Any]) -> str:
    """Return what was typed and the files of all settings; nothing where the run noted neither."""
    recipes = ", ".join(f"[`{path}`]({path})" for path in results["recipes"].values())
    typed = f"{fenced(results['command'], 'bash')}\n\nSource: `command.txt`." if results["command"] else ""
    settings = f"Every setting, defaults included: {recipes}." if recipes else ""
    return section("Command", typed, settings) if typed or settings else ""


def receipt(results: dict[str, Any]) -> str:
    """Return what was made from what: in the check of step 0, and inside the training job."""
    columns = {"check of step 0": (results["receipt"], "receipt.json")}
    if results["online_receipt"]:
        columns["training job"] = (results["online_receipt"], "pretrain/receipt.json")
    found = [receipt for receipt, _ in columns.values()]
    rows = [
        ["parameters, dense", *(millions(entry["dense_params"]) for entry in found)],
        ["parameters, MoE", *(millions(entry["total_params"]) for entry in found)],
        ["of these active for a token", *(millions(entry["active_params"]) for entry in found)],
        ["bytes read", *(size_text(entry["bytes_read"]) for entry in found)],
        ["bytes the slices needed", *(size_text(entry["bytes_needed"]) for entry in found)],
        ["bytes written", *(size_text(entry["bytes_written"]) for entry in found)],
        ["seconds, slowest rank", *(number(entry["seconds"], 3) for entry in found)],
        ["ranks", *(str(entry["ranks"]) for entry in found)],
        ["layout", *(_layout(entry["layout"]) for entry in found)],
        ["type of the parameters", *(", ".join(entry["parameter_dtypes"]) or "-" for entry in found)],
    ]
    spec = ", ".join(code(f"{key}={value}") for key, value in found[0]["spec"].items())
    made = "\n".join(f"- {plain(made_by)}: {count}" for made_by, count in found[0]["parameters_made_by"].items())
    return section(
        "Receipt",
        table(["", *columns], rows),
        f"Specification: {spec}.",
        _exactness(found[0]),
        f"Tensors by what made them:\n\n{made}" if made else "",
        f"Dense source: {code(found[0]['source'])}. {sources(*(file for _, file in columns.values()))}",
    )


def _exactness(entry: dict[str, Any]) -> str:
    measured = entry.get("within_tolerance")
    if not entry["exact"]:
        size_text = number(entry.get("max_abs_logit_diff"), 3)
        return f"This specification cannot be exact: the largest logit difference before training was {size_text}."
    if measured is None:
        return "This specification is exact up to rounding; logits were not compared."
    return (
        "This specification is exact up to rounding, and what was measured is"
        f" {'within' if measured else '**not** within'} the tolerance."
    )


def _layout(layout: dict[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items() if value > 1) or "no parallelism"


def _measured_with(settings: dict[str, Any]) -> str:
    batch = settings["batch_size"]
    amount = "as many sequences as fit" if batch == "auto" else f"{batch} sequences"
    by = " by vLLM" if settings.get("backend") == "vllm" else ""
    return f"{settings['dtype']} on {settings['device']}{by}, {amount} at a time"


def setting(results: dict[str, Any]) -> str:
    """Return what ran where, with which versions, and how long the stages took."""
    environment, settings = results["environment"], results["evaluation_settings"]["dense"]["settings"]
    rows = [
        ["processor", f"{environment['processor']}, {environment['cores']} cores"],
        ["memory", f"{environment['memory_gib']} GiB"],
        ["GPUs", ", ".join(environment["gpus"]) or "none"],
        ["system", environment["system"]],
        ["commit of nemo-upcycle", environment["commit"] or "not in git"],
        ["evaluation", _measured_with(settings)],
        *([name, text] for name, text in environment["versions"].items()),
    ]
    wall_times = ""
    if seconds := results["stage_seconds"]:
        stages = [[stage, duration(value), code(f"{stage}/_SUCCESS.json")] for stage, value in seconds.items()]
        total = ["all of these", duration(sum(seconds.values())), ""]
        wall_times = table(["stage", "wall time", "source"], [*stages, total], words=1)
    return section(
        "What ran on what",
        table(["machine and versions, as the report was written", ""], rows, words=1),
        "Sources: this machine, `evaluation/dense.json`.",
        wall_times,
    )


def next_steps(results: dict[str, Any], run_dir: Path) -> str:
    """Return the commands to go on with."""
    model = Path(results["evaluation_settings"]["trained"]["model"]["folder"])
    baseline = " dense_ct.trainer.max_steps=200" if "dense_ct" in results["evaluation"] else ""
    commands = f"""# train for longer, into a new folder
nemo upcycle pipeline --factory {shlex.quote(results["recipe"])} {shlex.quote(f"dir={run_dir}-longer")} \\
    pretrain.trainer.max_steps=200{baseline} --yes
# evaluate the trained model with lm-eval itself, on any of its tasks (needs the Hugging Face hub)
lm_eval run --model hf --model_args {shlex.quote(f"pretrained={model},dtype=bfloat16")} --tasks mmlu,piqa \\
    --batch_size 8"""
    return section("How to go on", fenced(commands, "bash"))
