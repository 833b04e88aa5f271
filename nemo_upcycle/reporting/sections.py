"""The sections of report.md. Each section is made from the results, and names the files of its numbers.

The first screen is in `opening`, and the sections about evaluation are in `evaluation_sections`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_upcycle.data.finished import overlap_shares, overlap_unit
from nemo_upcycle.data.losses import lost_text
from nemo_upcycle.reporting.markdown import millions, number, section, sources
from nemo_upcycle.reporting.results import TRAINED
from nemo_upcycle.reporting.router_metrics import ROUTER_METRICS
from nemo_upcycle.reporting.run_folder import MODELS
from nemo_upcycle.trainers.lineage import LINEAGE
from nemo_upcycle.trainers.settings import STEPS
from nemo_upcycle.utils.command_line import CommandLine
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.progress import duration
from nemo_upcycle.utils.writers import code, fenced, plain, table


#: Smallest number of steps that a suggested longer training has.
_LONGER_STEPS = 200


def command(results: dict[str, Any]) -> str:
    """Return the section with the command and the files of all settings; nothing if the run recorded none of them."""
    recipes = ", ".join(f"[`{path}`]({path})" for path in results["recipes"].values())
    typed = f"{fenced(results['command'], 'bash')}\n\nSource: `command.txt`." if results["command"] else ""
    settings = f"Every setting, defaults included: {recipes}." if recipes else ""
    return section("Command", typed, settings) if typed or settings else ""


def training(results: dict[str, Any]) -> str:
    """Return the section with the models' training settings, first and last losses, and speed."""
    stages = results["training"]
    columns = [_settings(done) | _outcome(done) for done in stages.values()]
    rows = [
        [title, *(column.get(title, "-") for column in columns)]
        for title in dict.fromkeys(title for column in columns for title in column)
    ]
    files = [f"{stage}/{file}" for stage in stages for file in ("metrics.jsonl", "training.json")]
    files += [f"{stage}/{LINEAGE}" for stage, done in stages.items() if "branches" in done]
    return section(
        "Training",
        _data(stages),
        texts(results["texts"]),
        overlap(results["heldout_overlap"]),
        table(["", *(MODELS[TRAINED[stage]] for stage in stages)], rows),
        _branches(stages),
        _changes(stages),
        _fp8(stages),
        "![loss over FLOPs](loss_flops.png)" if "loss_flops" in results["figures"] else "",
        sources(*files),
    )


def _branches(stages: dict[str, Any]) -> str:
    """Return a table of the branches of rewound trainings; nothing if no training was rewound."""
    rows = [
        [
            plain(f"{MODELS[TRAINED[stage]]}, {branch['start']}"),
            "-" if branch["last_step"] is None else f"{branch['last_step']:,}",
            number(branch["last_loss"]),
            branch["time"] or "-",
        ]
        for stage, done in stages.items()
        for branch in done.get("branches", ())
    ]
    return table(["branch", "last step", "training loss there", "rewound"], rows, words=1) if rows else ""


def _changes(stages: dict[str, Any]) -> str:
    """Return a table of settings that were changed after a training had started; nothing if there are none."""
    rows = [
        [str(change.get(key, "-")) for key in ("setting", "before", "after", "time")]
        for done in stages.values()
        for change in done.get("changes", ())
    ]
    if not rows:
        return ""
    header = [
        "setting changed after the start (only the number of steps affects the result)",
        "before",
        "after",
        "when",
    ]
    return table(header, rows, words=3)


def _fp8(stages: dict[str, Any]) -> str:
    """Return a table of FP8's numerical losses in the first and last measured step; nothing if none was measured."""
    titles = {
        "amax": "largest number",
        "underflow": "share rounded to zero",
        "saturated": "share clipped",
        "scale_inv_min": "smallest inverse scale",
        "scale_inv_max": "largest inverse scale",
    }
    found = {stage: done["fp8"] for stage, done in stages.items() if "fp8" in done}
    keys = [key for key in titles if any(key in one for fp8 in found.values() for one in fp8["last"].values())]
    rows = [
        [
            f"{kind} of the {MODELS[TRAINED[stage]]}",
            *(" / ".join(number(fp8[step].get(kind, {}).get(key), 3) for step in ("first", "last")) for key in keys),
        ]
        for stage, fp8 in found.items()
        for kind in fp8["last"]
    ]
    return table(["FP8, first step / last step", *(titles[key] for key in keys)], rows) if rows else ""


def _data(stages: dict[str, Any]) -> str:
    """Describe each model's training data; describe it once if all models have the same data."""
    data = {f" of the {MODELS[TRAINED[stage]]}": done["settings"]["data"] for stage, done in stages.items()}
    if len(set(data.values())) == 1:
        data = {"": next(iter(data.values()))}
    return "\n\n".join(f"Data{whose}: {plain(text)}." for whose, text in data.items())


def texts(found: dict[str, Any]) -> str:
    """Return a table of the text read, trained on and lost from each source; nothing for conversations.

    Args:
        found: entry `sources` of the data's manifest.
    """
    rows = []
    for name, source in found.items():
        if not {"steps", "splits", "lost"} <= source.keys():  # earlier versions did not count the lost text
            continue
        train, lost = source["splits"]["train"], source["lost"]
        lost_bytes = sum(one["bytes"] for one in lost["reasons"].values())
        read = f"{source['steps']['read']['in']:,}"
        kept = [f"{train['documents']:,}", size_text(train["bytes"]), size_text(lost_bytes) if lost_bytes else "none"]
        rows.append([name, read, *kept, source.get("text_key", "text"), "; ".join(lost_text(lost)) or "-"])
    if not rows:
        return ""
    header = ["source", "documents read", "documents trained on", "bytes trained on", "bytes lost", "field", "reason"]
    return table(header, rows, words=2) + "\n\nSource: `manifest.json` of the data."


def overlap(found: dict[str, Any] | None) -> str:
    """Return a table of the held-out text found in the training text; nothing if nobody searched for it.

    Args:
        found: entry `heldout_overlap` of the data's manifest.
    """
    if not found or not found["rows"]:
        return ""
    rows = [
        [
            f"{row['source']}, {row['split']}",
            *(f"{row[key]:,}" for key in ("documents", "above", "removed")),
            *overlap_shares(row),
        ]
        for row in found["rows"]
    ]
    above = f"more than {100 * found['most']:g} % in training text"
    header = ["held-out text", "documents", above, "removed", f"share of {overlap_unit(found)} before", "after"]
    return table(header, rows) + "\n\nSource: `manifest.json` of the data."


def _settings(done: dict[str, Any]) -> dict[str, str]:
    """Return the training settings of a stage, by their titles in the table."""
    settings = done["settings"]
    schedule = settings["schedule"]
    end = f" to {number(schedule['min_lr'], 6)}" if schedule.get("min_lr") is not None else ""
    warmup = f", {schedule['warmup_steps']} of them warm-up" if schedule.get("warmup_steps") else ""
    steps = f"{schedule['name']}{end} over {settings['max_steps']} steps{warmup}"
    rows = {
        "peak learning rate": f"{number(settings['max_lr'], 6)}, {steps}",
        "batch (sequences per step)": f"{settings['global_batch_size']} (micro batch {settings['micro_batch_size']})",
        "sequence length (tokens)": str(settings["seq_length"]),
        "precision": settings["precision"],
        "optimizer": f"{settings['optimizer']}, weight decay {number(settings['weight_decay'], 6)}",
        "ranks of the training job": str(settings["ranks"]),
    }
    if "balancing" in settings:
        rows["load balancing of the experts"] = str(settings["balancing"])
    return rows


def _outcome(done: dict[str, Any]) -> dict[str, str]:
    """Return the losses, speed and memory of a training stage, by their titles in the table."""
    rows = {
        "steps": str(done["steps"]),
        "tokens": f"{done['tokens']:,}",
        "training loss, first step": number(done["first_loss"]),
        "training loss, last step": number(done["last_loss"]),
        "validation loss, first": number(done["first_validation_loss"]),
        "validation loss, last": number(done["last_validation_loss"]),
        "time spent in steps": duration(done["seconds"]),
        "rank-hours spent in steps": number(done["seconds"] / 3600 * done["settings"]["ranks"], 3),
        "tokens per second": number(done["tokens_per_s"]),
    }
    planned = done.get("planned") or {}
    if planned:
        rows["planned tokens per second"] = number(planned["tokens_per_s"])
    conventions = "full attention / causal half"
    if rate := done.get("tflops_per_gpu"):
        rows[f"TFLOP/s per rank ({conventions})"] = f"{number(rate['full'], 3)} / {number(rate['causal'], 3)}"
    for name, mfu in done.get("mfu", {}).items():
        rows[f"MFU, {name.upper()} peak ({conventions})"] = f"{100 * mfu['full']:.1f} % / {100 * mfu['causal']:.1f} %"
    share = f" ({100 * done['memory_share']:.0f} % of its GPU)" if "memory_share" in done else ""
    rows["peak memory per rank"] = f"{done['memory_gib']:.2f} GiB{share}"
    if planned:
        rows["planned memory of the fullest rank"] = f"{planned['memory_gib']:.2f} GiB"
    return rows


def expert_load(results: dict[str, Any]) -> str:
    """Return the section about expert load; nothing if the load was not counted."""
    load = results["training"]["pretrain"].get("expert_load")
    if not load:
        return ""
    rows = [
        [name, *(f"{100 * load[step][key]:.2f} %" for step in ("first", "last"))]
        for name, key in (("least used expert in any layer", "min"), ("most used expert in any layer", "max"))
    ]
    rows.append(["coefficient of variation (mean over layers)", *(f"{load[s]['cv']:.3f}" for s in ("first", "last"))])
    router = results["training"]["pretrain"].get("router", {"first": {}, "last": {}})
    rows += [
        [metric.title, *(f"{router[step][key]:.4g}" if key in router[step] else "-" for step in ("first", "last"))]
        for key, metric in ROUTER_METRICS.items()
        if metric.is_row and key in router["first"] | router["last"]
    ]
    return section(
        "Expert load",
        "![expert load per layer over the steps](experts.png)",
        table(["share of a layer's token slots", "first step", "last step"], rows),
        "![routers over tokens](routers.png)" if "routers" in results["figures"] else "",
        f"With perfect balance, each expert has 1/E = {100 * load['first']['balanced']:.4g} % (coefficient 0)."
        " Source: `pretrain/metrics.jsonl`.",
    )


def receipt(results: dict[str, Any]) -> str:
    """Return the section with two receipts: one from the check of step 0, and one from the training job."""
    columns = {"check of step 0": (results["receipt"], "receipt.json")}
    if results["online_receipt"]:
        columns["training job"] = (results["online_receipt"], "pretrain/receipt.json")
    receipts = [receipt for receipt, _ in columns.values()]
    rows = [
        ["parameters, parent", *(millions(entry["dense_params"]) for entry in receipts)],
        ["parameters, MoE", *(millions(entry["total_params"]) for entry in receipts)],
        ["active parameters per token", *(millions(entry["active_params"]) for entry in receipts)],
        ["bytes read", *(size_text(entry["bytes_read"]) for entry in receipts)],
        ["bytes needed for the slices", *(size_text(entry["bytes_needed"]) for entry in receipts)],
        ["bytes written", *(size_text(entry["bytes_written"]) for entry in receipts)],
        ["seconds (slowest rank)", *(number(entry["seconds"], 3) for entry in receipts)],
        ["ranks", *(str(entry["ranks"]) for entry in receipts)],
        ["layout", *(_layout(entry["layout"]) for entry in receipts)],
        ["parameter type", *(", ".join(entry["parameter_dtypes"]) or "-" for entry in receipts)],
    ]
    spec = ", ".join(code(f"{key}={value}") for key, value in receipts[0]["spec"].items())
    made = "\n".join(f"- {plain(made_by)}: {count}" for made_by, count in receipts[0]["parameters_made_by"].items())
    return section(
        "Receipt",
        table(["", *columns], rows),
        f"Specification: {spec}.",
        f"Tensors by origin:\n\n{made}" if made else "",
        f"Made from {code(receipts[0]['source'])}. {sources(*(file for _, file in columns.values()))}",
    )


def _layout(layout: dict[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items() if value > 1) or "no parallelism"


def _measured_with(settings: dict[str, Any]) -> str:
    amount = f"{batch} sequences" if (batch := settings["batch_size"]) != "auto" else "as many sequences as fit"
    by = " by vLLM" if settings.get("backend") == "vllm" else ""
    return f"{settings['dtype']} on {settings['device']}{by}, {amount} at a time"


def what_ran_on_what(results: dict[str, Any]) -> str:
    """Return the section with the machine, the versions, and the wall time of each stage."""
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
        total = ["all stages", duration(sum(seconds.values())), ""]
        wall_times = table(["stage", "wall time", "source"], [*stages, total], words=1)
    return section(
        "Machine and versions",
        table(["when the report was written", ""], rows, words=1),
        "Sources: this machine, `evaluation/dense.json`.",
        wall_times,
    )


def next_steps(results: dict[str, Any], run_dir: Path) -> str:
    """Return the commands for a longer training and for more tasks; nothing if the run did not note its command."""
    typed = CommandLine.read(results["command"] or "")
    if typed is None:
        return ""
    name = STEPS.bridge if results["trainer"] == "bridge" else STEPS.nemo
    steps = {
        f"{stage}.{name}": max(_LONGER_STEPS, 2 * done["settings"]["max_steps"])
        for stage, done in results["training"].items()
    }
    longer = typed.changed({"dir": f"{run_dir.absolute()}-longer"} | steps)
    model = f"pretrained={results['evaluation_settings']['trained']['model']['folder']},dtype=bfloat16"
    words = ["run", "--model", "hf", "--model_args", model, "--tasks", "mmlu,piqa", "--batch_size", "8"]
    tasks = replace(typed, words=(typed.sibling("lm_eval"), *words), python_path="")
    commands = f"""# train longer, in a new folder
{longer}
# evaluate the trained model on any task of lm-eval (needs the Hugging Face hub)
{tasks}"""
    return section("Next steps", fenced(commands, "bash"))
