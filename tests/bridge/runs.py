"""Runs of Megatron-Bridge's own `pretrain` on this machine's CPU, from configuration to checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.errors import SpecError
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from tests.distributed.ranks import run_ranks
from tests.models import PARALLEL


SEQUENCE, VOCABULARY = 32, 256
#: Spec fields of most runs.
SPEC: dict[str, Any] = {"num_experts": 4, "top_k": 2}


def run_config(
    dense: Path,
    folder: Path | str,
    spec: UpcycleSpec | None,
    *,
    style: str = "provider",
    steps: int = 1,
    vocab_size: int = VOCABULARY,
    pattern: str | None = None,
    lr: float = 0.0,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **layout: int,
) -> Any:
    """Return a Bridge run with a learning rate of zero by default, so that its checkpoints hold the weights of step 0.

    Args:
        dense: dense checkpoint.
        folder: folder for the checkpoints.
        spec: spec of the model, None for the dense model.
        style: `provider`, or `builder` for the configuration class that will replace providers.
        steps: steps to train.
        vocab_size: vocabulary of the model; rows beyond the parent's are padding.
        pattern: layers of a HybridModel, or None for a GPTModel.
        lr: learning rate.
        model: further settings of the model.
        optimizer: settings of the optimizer. `use_distributed_optimizer` is also set for DDP.
        layout: layout sizes other than 1.
    """
    from megatron.bridge.recipes.common import _pretrain_common

    from nemo_upcycle.trainers.bridge.models import upcycled_config, upcycled_provider

    sizes = {PARALLEL[name]: size for name, size in layout.items()}
    settings: dict[str, Any] = {
        "bf16": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "sequence_parallel": layout.get("tp", 1) > 1,
        "seq_length": SEQUENCE,
        "vocab_size": vocab_size,
    }
    settings |= model or {}
    if pattern:
        settings["hybrid_layer_pattern"] = pattern
    config = _pretrain_common()
    make = upcycled_config if style == "builder" else upcycled_provider
    config.model = make(dense, spec, **settings, **sizes)
    config.mixed_precision = None
    config.tokenizer.tokenizer_type, config.tokenizer.vocab_size = "NullTokenizer", VOCABULARY - 1
    config.dataset.seq_length, config.dataset.num_workers = SEQUENCE, 0
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = steps, 4, 1
    config.validation.eval_iters = 0
    config.optimizer.lr = config.optimizer.min_lr = lr
    for name, value in (optimizer or {}).items():
        setattr(config.optimizer, name, value)
    config.ddp.use_distributed_optimizer = config.optimizer.use_distributed_optimizer
    config.scheduler.lr_warmup_iters = 0
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = False
    config.checkpoint.save = config.checkpoint.load = str(folder)
    config.checkpoint.async_save = False
    config.logger.tensorboard_dir = None
    config.dist.distributed_backend = "gloo"
    return config


def as_builder(model: Any) -> Any:
    """Return a provider's model in the form of a builder. The recipes of Bridge's main branch use builders."""
    from dataclasses import fields

    from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
    from megatron.bridge.models.transformer_config import TransformerConfig

    if hasattr(model, "transformer"):
        return model
    parts = {kind: {one.name for one in fields(kind) if one.init} for kind in (TransformerConfig, GPTModelConfig)}
    inner, outer = (
        {name: getattr(model, name) for name in names if hasattr(model, name) and "layer_spec" not in name}
        for names in parts.values()
    )
    return GPTModelConfig(transformer=TransformerConfig(**inner), **outer)


def bridges_pretrain() -> Callable[..., None]:
    """Return Bridge's `pretrain` for this rank's CPU; it takes a configuration and callbacks."""
    use_cpu_backend()
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    return partial(pretrain, forward_step_func=forward_step)


def train(
    dense: Path,
    folder: Path | str,
    fields: dict[str, Any] | None,
    *,
    load: str | None = None,
    async_save: bool = False,
    save_later: Path | None = None,
    starts: int = 1,
    hf_source: Path | None = None,
    live: Path | None = None,
    **options: Any,
) -> None:
    """Train on this rank, and upcycle on start.

    Args:
        dense: dense checkpoint.
        folder: folder for the checkpoints.
        fields: fields of the spec, None for the dense model.
        load: folder to resume from, in another spelling than `folder`; None uses `folder`.
        async_save: whether checkpoints are written in the background.
        save_later: folder that replaces `folder` after everything is configured, as on a command line.
        starts: number of starts; each trains one more step. The dense weights are deleted before the second start.
        hf_source: Hugging Face folder with the class of the upcycled model. If set, all checkpoints get such a folder.
        live: folder to which the trained model is exported at the end; needs `hf_source`.
        options: arguments of `run_config`.
    """
    pretrain = bridges_pretrain()
    config = hooked(dense, folder, fields, **options)
    config.checkpoint.load = load or config.checkpoint.save
    config.checkpoint.async_save = async_save
    callbacks: list[Any] = []
    if hf_source is not None:
        config.checkpoint.also_save_hf_checkpoint, config.checkpoint.hf_source_path = True, str(hf_source)
        callbacks.append(_export_at_the_end(hf_source, live))
    if save_later is not None:
        config.checkpoint.save = str(save_later)
    for start in range(starts):
        if start:
            config.train.train_iters += 1
            (dense / "model.safetensors").unlink(missing_ok=True)
        pretrain(config, callbacks=callbacks)


def train_on_ranks(
    ranks: int, dense: Path, folder: Path, fields: dict[str, Any] | None = None, **options: Any
) -> None:
    """Train as `train` does, on several ranks."""
    run_ranks(_train, ranks, dense, folder, fields, options, process_group=False)


def _train(dense: Path, folder: Path, fields: dict[str, Any] | None, options: dict[str, Any]) -> None:
    train(dense, folder, fields, **options)


def export(dense: Path, run: Path, output: Path) -> Path:
    """Export a run's last checkpoint with the command, in float32; return the folder."""
    from nemo_upcycle.cli.main import main

    assert main(["export", str(run), str(output), "--dense", str(dense), "--dtype", "float32"]) == 0
    return output


def offline(dense: Path, output: Path, fields: dict[str, Any]) -> Path:
    """Convert a dense checkpoint offline, in float32; return the folder."""
    with open_dense(dense) as source:
        convert(source, output, UpcycleSpec(**fields), dtype=torch.float32, progress=False)
    return output


def ends_as_converted(dense: Path, run: Path, fields: dict[str, Any] | None, **options: Any) -> bool:
    """Train on the ranks of a layout, and return whether the export is bit-identical to an offline conversion.

    Args:
        dense: dense checkpoint.
        run: folder for the checkpoints.
        fields: fields of the spec. None for the dense model, whose export must be bit-identical to its checkpoint.
        options: arguments of `train`; `parent` replaces `dense` as the folder to start from.
    """
    ranks = max(options.get("tp", 1) * options.get("pp", 1), options.get("ep", 1))
    train_on_ranks(ranks, options.pop("parent", dense), run, fields, **options)
    exported = export(dense, run, run.with_name(f"{run.name}-exported"))
    wanted = offline(dense, run.with_name(f"{run.name}-offline"), fields) if fields else dense
    return not differences(exported, wanted)


def whole_as_in_two_halves(dense: Path, folder: Path, **options: Any) -> Path:
    """Check that 2 + 2 steps give the same bits as 4 steps and other bits than 2 steps; return the exported folder."""
    train_on_ranks(2, dense, folder / "whole", SPEC, steps=4, **options)
    for steps in (2, 4):
        train_on_ranks(2, dense, folder / "twice", SPEC, steps=steps, **options)
    whole, twice = (export(dense, folder / run, folder / f"{run}-hf") for run in ("whole", "twice"))
    assert not differences(whole, twice)
    assert differences(whole, export(dense, folder / "twice/iter_0000002", folder / "first-hf"))
    return whole


def differences(left: Path, right: Path) -> list[str]:
    """Return the names of tensors that differ between two folders, or that only one folder has."""
    with SafetensorsFolder(left) as one, SafetensorsFolder(right) as other:
        both = set(one.names()) & set(other.names())
        changed = {name for name in both if not torch.equal(one.read(name), other.read(name))}
        return sorted(changed | (set(one.names()) ^ set(other.names())))


def hooked(dense: Path, folder: Path | str, fields: dict[str, Any] | None, **options: Any) -> Any:
    """Return the configuration of a run that starts from a dense checkpoint."""
    from nemo_upcycle.bridge import with_parent, with_upcycling

    config = run_config(dense, folder, None if fields is None else UpcycleSpec(**fields), **options)
    return with_parent(config, dense) if fields is None else with_upcycling(config, dense, **fields)


def refusal(dense: Path, folder: Path, fields: dict[str, Any], changes: dict[str, Any], **options: Any) -> str:
    """Change settings of a run, and return the message that refuses the run before its start.

    Args:
        dense: dense checkpoint.
        folder: folder for the checkpoints.
        fields: fields of the spec.
        changes: PART.FIELD of the configuration -> value.
        options: arguments of `run_config`.
    """
    from nemo_upcycle.trainers.bridge.hooks import pre_wrap_hooks
    from nemo_upcycle.trainers.bridge.upcycling import prepare

    config = hooked(dense, folder, fields, **options)
    for name, value in changes.items():
        part, field = name.split(".")
        owner = getattr(config, part)
        setattr(getattr(owner, "transformer", owner), field, value)
    before = len(pre_wrap_hooks(config.model))
    with pytest.raises(SpecError) as refused:
        prepare(config)
    assert len(pre_wrap_hooks(config.model)) == before
    return str(refused.value)


def fill(parent: Path, folder: Path, fields: dict[str, Any] | None, **options: Any) -> Any:
    """Build and fill a model on this rank, as the start of a run does.

    Args:
        parent: dense checkpoint.
        folder: folder for the receipt.
        fields: fields of the spec, None for the dense model.
        options: arguments of `run_config`.

    Returns:
        The chunk, and the provider that built it.
    """
    use_cpu_backend()
    from nemo_upcycle.trainers.bridge.upcycling import prepare

    config = hooked(parent, folder, fields, **options)
    prepare(config)
    config._checkpoint_load_required = False  # in a real run, Bridge's pretrain sets this
    config.model.finalize()
    config.model.initialize_model_parallel(seed=1)
    (chunk,) = config.model.provide_distributed_model(wrap_with_ddp=False)
    return chunk, config.model


def fill_twice(parent: Path, folder: Path, options: dict[str, Any]) -> list[str]:
    """Fill one dense model with the hook and another with Bridge's loader; return the parameters that differ.

    Args:
        parent: dense checkpoint.
        folder: folder for the receipt.
        options: arguments of `run_config`.
    """
    ours, _ = fill(parent, folder, None, **options)
    from megatron.bridge import AutoBridge

    provider = run_config(parent, folder, None, **options).model
    provider.finalize()
    (theirs,) = provider.provide_distributed_model(wrap_with_ddp=False)
    AutoBridge.from_hf_pretrained(str(parent)).load_hf_weights([theirs])
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    return [name for (name, one), (same, other) in pairs if name != same or not torch.equal(one, other)]


def _export_at_the_end(hf_source: Path, output: Path | None) -> Any:
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.callbacks import Callback

    import nemo_upcycle.trainers.bridge.conversion  # noqa: F401

    class Export(Callback):
        def on_train_end(self, context: Any) -> None:
            bridge = AutoBridge.from_hf_pretrained(str(hf_source))
            bridge.save_hf_pretrained(context.model, output, show_progress=False, strict=True)

    return Export()
