"""The sections of report.md about the two training stages: settings, losses, rates, expert load."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.reporting.markdown import number, plain, section, sources, table
from nemo_upcycle.reporting.run_folder import MODELS
from nemo_upcycle.utils.progress import duration


_TRAINED = {"pretrain": "trained", "dense_ct": "dense_ct"}


def training(results: dict[str, Any]) -> str:
    """Return the training settings, first and last losses, and speed of the models."""
    stages = results["training"]
    columns = [_settings(done) | _outcome(done) for done in stages.values()]
    rows = [
        [title, *(column.get(title, "-") for column in columns)]
        for title in dict.fromkeys(title for column in columns for title in column)
    ]
    files = [
        f"{stage}/{file}"
        for stage, done in stages.items()
        for file in ("metrics.jsonl", *(["training.json"] if "settings" in done else []))
    ]
    return section(
        "Training",
        _data(stages),
        table(["", *(MODELS[_TRAINED[stage]] for stage in stages)], rows),
        _changes(stages),
        "![tokens per second and memory](speed.png)",
        sources(*files),
    )


def _changes(stages: dict[str, Any]) -> str:
    """Return the settings that were changed after a training had started; nothing where none was."""
    rows = [
        [str(change.get(key, "-")) for key in ("setting", "before", "after", "time")]
        for done in stages.values()
        for change in done.get("changes", ())
    ]
    if not rows:
        return ""
    header = ["changed after the start, without effect on the result but for more steps", "before", "after", "when"]
    return table(header, rows, words=3)


def _data(stages: dict[str, Any]) -> str:
    """Return what the models were trained on, once where it is the same."""
    told = {stage: done["settings"]["data"] for stage, done in stages.items() if "data" in done.get("settings", {})}
    if len(told) == len(stages) and len(set(told.values())) == 1:
        told = {"": next(iter(told.values()))}
    return "\n\n".join(
        f"Data{f' of the {MODELS[_TRAINED[stage]]}' if stage else ''}: {plain(data)}." for stage, data in told.items()
    )


def _settings(done: dict[str, Any]) -> dict[str, str]:
    """Return a stage's training settings; without `training.json`, only the highest learning rate."""
    found = done.get("settings")
    if not found:
        return {"learning rate, peak": number(done.get("highest_lr"))}
    schedule = found["schedule"]
    end = f" to {number(schedule['min_lr'], 6)}" if schedule.get("min_lr") is not None else ""
    warmup = f", {schedule['warmup_steps']} of them warm-up" if schedule.get("warmup_steps") else ""
    steps = f"{schedule['name']}{end} over {found['max_steps']} steps{warmup}"
    rows = {
        "learning rate, peak": f"{number(found['max_lr'], 6)}, {steps}",
        "batch, sequences a step": f"{found['global_batch_size']} (micro batch {found['micro_batch_size']})",
        "sequence length, tokens": str(found["seq_length"]),
        "precision": found["precision"],
        "optimizer": f"{found['optimizer']}, weight decay {number(found['weight_decay'], 6)}",
        "ranks of the training job": str(found["ranks"]),
    }
    factors = found.get("lr_factors", {})
    if factors.get("warmup_steps") or any(factors.get(part, 1) != 1 for part in ("router", "experts")):
        steps = factors["warmup_steps"]
        frozen = f", {factors['freezes']} frozen for {steps} steps" if steps else ""
        rows["factors on the learning rate"] = (
            f"router {number(factors['router'], 6)}, experts {number(factors['experts'], 6)}{frozen}"
        )
    return rows


def _outcome(done: dict[str, Any]) -> dict[str, str]:
    """Return the losses of a training stage, its speed and its memory."""
    ranks = done.get("settings", {}).get("ranks")
    rows = {
        "steps": str(done["steps"]),
        "tokens": f"{done['tokens']:,}",
        "training loss, first step": number(done["first_loss"]),
        "training loss, last step": number(done["last_loss"]),
        "validation loss, first": number(done["first_validation_loss"]),
        "validation loss, last": number(done["last_validation_loss"]),
        "time in steps": duration(done["seconds"]),
        "ranks times hours in steps": number(done["seconds"] / 3600 * ranks, 3) if ranks else "-",
        "tokens per second": number(done["tokens_per_s"]),
    }
    planned = done.get("planned") or {}
    if planned:
        rows["tokens per second, planned"] = number(planned["tokens_per_s"])
    conventions = "full attention / causal half"
    if rate := done.get("tflops_per_gpu"):
        rows[f"TFLOP/s of a rank ({conventions})"] = f"{number(rate['full'], 3)} / {number(rate['causal'], 3)}"
    for name, mfu in done.get("mfu", {}).items():
        rows[f"MFU, {name.upper()} peak ({conventions})"] = f"{100 * mfu['full']:.1f} % / {100 * mfu['causal']:.1f} %"
    if "memory_gib" in done:
        share = f" ({100 * done['memory_share']:.0f} % of its card)" if "memory_share" in done else ""
        rows["peak memory of a rank"] = f"{done['memory_gib']:.2f} GiB{share}"
    if planned:
        rows["memory of the fullest rank, planned"] = f"{planned['memory_gib']:.2f} GiB"
    return rows


#: The router metrics of the report: the name in `metrics.jsonl` and the title.
_ROUTER_ROWS = {
    "load_entropy": "entropy of the load over that of perfect balance",
    "dead_experts": "dead experts, all layers (less than 1 % of a balanced share)",
    "dropped": "dropped, as a part of the wanted slots",
    "load_balancing_loss": "load-balancing loss without its coefficient (1: balanced)",
    "expert_distance": "distance of the experts from their mean, relative (0: copies)",
}


def expert_load(results: dict[str, Any]) -> str:
    """Return how evenly the experts were used; nothing without counts."""
    load = results["training"]["pretrain"].get("expert_load")
    if not load:
        return ""
    rows = [
        [name, *(f"{100 * load[step][key]:.2f} %" for step in ("first", "last"))]
        for name, key in (("least used expert of any layer", "min"), ("most used expert of any layer", "max"))
    ]
    rows.append(["coefficient of variation, mean of the layers", *(f"{load[s]['cv']:.3f}" for s in ("first", "last"))])
    router = results["training"]["pretrain"].get("router", {"first": {}, "last": {}})
    rows += [
        [title, *(f"{router[step][key]:.4g}" if key in router[step] else "-" for step in ("first", "last"))]
        for key, title in _ROUTER_ROWS.items()
        if key in router["first"] | router["last"]
    ]
    return section(
        "Expert load",
        "![expert load per layer over the steps](experts.png)",
        _worst(load["worst"]),
        table(["share of a layer's token slots", "first step", "last step"], rows),
        "![routers over tokens](routers.png)" if "routers" in results["figures"] else "",
        f"Perfect balance is 1/E = {100 * load['first']['balanced']:.4g} % and a coefficient of 0."
        " Source: `pretrain/metrics.jsonl`.",
    )


def _worst(worst: dict[str, Any]) -> str:
    text = (
        f"Max violation over the whole run (load of the busiest expert over the balanced load, minus 1):"
        f" {worst['max_violation']:.3f}, in layer {worst['layer']} at step {worst['step']}."
    )
    if "dead_experts" in worst:
        text += f" Most dead experts in a step, all layers together: {worst['dead_experts']:.0f}."
    return text
