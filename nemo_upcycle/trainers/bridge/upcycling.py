"""Upcycling inside Megatron-Bridge: a hook that fills the chunks of a run that has no checkpoint of its own.

Bridge calls the hook on every start, after the chunks are built and before they are wrapped in a `Float16Module` and a
DDP and get an optimizer. Master weights are therefore made from the filled weights. Bridge loads Hugging Face weights
at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.training.checkpointing import _has_global_non_persistent_checkpoint
from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists, is_hf_checkpoint_dir

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.models.balancing import QUANTILES
from nemo_upcycle.models.delta_nets import check_gates
from nemo_upcycle.models.families import why_not_exported
from nemo_upcycle.models.families.refused import FINISH_WITH_0_2
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.hybrid import hybrid_of
from nemo_upcycle.models.megatron_config import check_spec
from nemo_upcycle.models.wrapper import read_config
from nemo_upcycle.online.upcycle import fill_chunks, merge_receipts
from nemo_upcycle.sources.fetch import tokenizer_folder
from nemo_upcycle.sources.resolve import open_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.aux_loss import correct_losses
from nemo_upcycle.trainers.bridge import require_bridge
from nemo_upcycle.trainers.bridge.chat import ChatDataset, check_balancing
from nemo_upcycle.trainers.bridge.hooks import add_pre_wrap_hook, pre_wrap_hooks
from nemo_upcycle.trainers.bridge.interleaving import store_contiguous
from nemo_upcycle.trainers.bridge.model_changes import follow
from nemo_upcycle.trainers.bridge.models import Origin
from nemo_upcycle.trainers.bridge.new_rates import build_with_saved_rates
from nemo_upcycle.trainers.bridge.node import UpcyclingConfig, architecture_at, folder_of
from nemo_upcycle.trainers.bridge.resharding import fit_layout
from nemo_upcycle.trainers.bridge.run_folder import (
    RECEIPT,
    check_folder,
    load_receipt,
    load_trusted,
    same_folder,
    save_receipt,
)
from nemo_upcycle.trainers.bridge.settings import describe, mixed_precision_of, require_callbacks
from nemo_upcycle.trainers.settings import check_masters
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.validation import is_whole


#: Name of the hook with which a provider of `AutoBridge` loads weights.
_BRIDGES_LOADING = "load_weights_hf_to_megatron"


def __getattr__(name: str) -> Any:
    """Raise an error for a function that 0.3 had here, and name its replacement."""
    if name == "upcycle_on_start":
        raise ImportError(
            "upcycle_on_start was removed. Write config = with_upcycling(config, dense, num_experts=8, top_k=2) from"
            " nemo_upcycle.bridge, or with_parent(config, dense) without a spec.",
            name=__name__,
        )
    raise AttributeError(name)


def prepare(config: UpcyclingConfig) -> None:
    """Complete and check a run that starts from a dense checkpoint, and let Bridge call the hook that fills its model.

    Bridge calls this function at the start of every rank, through `UpcyclingConfig.validate`, when all settings are
    known. A run that has a checkpoint of its own resumes from it and reads nothing from the dense checkpoint. The
    receipt is written as `receipt.json` beside the checkpoints, before the first checkpoint is written. A run without
    a tokenizer gets the parent's tokenizer.

    Args:
        config: configuration of the run; changed in place.

    Raises:
        SpecError: the configuration contradicts its node, or would overwrite or lose the filled weights.
        UpcycleError: the parent does not exist, or neither the parent nor the run has a tokenizer.
    """
    require_bridge()
    follow_node(config)
    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type == "HuggingFaceTokenizer" and not tokenizer.tokenizer_model:
        tokenizer.tokenizer_model = str(tokenizer_folder(config.parents[0]).absolute())
    check(config)
    transformer: Any = getattr(config.model, "transformer", config.model)
    transformer.perform_initialization = False  # the filled weights replace any random weights
    hooks = (getattr(hook, "__self__", None) for hook in pre_wrap_hooks(config.model))
    for hook in hooks:
        if isinstance(hook, UpcycleHook):  # the hook of a copied run, or of an earlier start
            hook.config = config
            return
    add_pre_wrap_hook(config.model, UpcycleHook(config).fill)


def follow_node(config: UpcyclingConfig) -> None:
    """Let a run's model follow its node: the present parent and spec of the node define the model."""
    follow(config.model, Origin(architecture_at(config.parents[0]), config.spec))


class UpcycleHook:
    """Fills the chunks of a run that has no checkpoint of its own. Bridge calls the method `fill`.

    Bridge may copy or pickle a model's settings. A copied hook belongs to the same run. A pickled hook has no run.

    Args:
        config: configuration of the run.
    """

    def __init__(self, config: UpcyclingConfig) -> None:
        self.config = config

    def __deepcopy__(self, memo: dict[int, Any]) -> UpcycleHook:
        return UpcycleHook(self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": None}

    def fill(self, chunks: list[Any]) -> list[Any]:
        """Fill a rank's chunks, and write the receipt on the first rank."""
        config = self.config
        paths = [folder_of(address) for address in config.parents]
        require_callbacks(config)
        store_contiguous()
        if config.checkpoint.async_save and not torch.cuda.is_available():
            expected = "False without a GPU, because Bridge divides by the number of GPUs"
            raise SpecError(field="config.checkpoint.async_save", got=True, expected=expected, fix="set it to False")
        if torch.distributed.get_rank() == 0:
            show_messages().info("parent: %s", ", ".join(map(str, paths)))
        losses = correct_losses(chunks[0].config)
        if _goes_on(config, paths):
            fit_layout(config)
            if config.scheduler.override_opt_param_scheduler:
                build_with_saved_rates(config)
            return chunks
        if config._checkpoint_load_required:
            raise SpecError(
                field="config.checkpoint.load",
                kind="refused",
                got="names no checkpoint, and Bridge's finetune needs a checkpoint to start from",
                fix="call pretrain(config, forward_step) with any data, and then finetune_from(config, run)",
            )
        if isinstance(config.dataset, ChatDataset):
            config.dataset.chat.require_tokenizer_of(str(paths[0]))
        how = config.upcycling.non_expert_weights if config.upcycling else "first"
        receipt = fill_chunks(chunks, paths, config.spec, how)
        receipt.auxiliary_losses = losses
        with open_dense(paths[0]) as dense:
            padding = config.model.vocab_size - dense.architecture.vocab_size
        if padding:
            receipt.exact = False
            receipt.inexact_because.append(f"{padding} padding rows of the vocabulary take part in the loss")
        if merged := merge_receipts(receipt):
            save_receipt(merged, config.checkpoint.save)
            said = describe(config)
            if config.spec and (why := why_not_exported(architecture_at(config.parents[0]).upcycled(config.spec))):
                said.append(why)
            if merged.inexact_because:
                said.append(f"not the parent's function: {'; '.join(merged.inexact_because)}")
            for line in said:  # not a warning, because Bridge drops warnings
                show_messages().info("%s", line)
        torch.distributed.barrier()
        return chunks


def check(config: UpcyclingConfig) -> None:
    """Check that a run can be filled, and that its settings keep the filled weights.

    Raises:
        SpecError: the run cannot be filled, or would lose the filled weights.
    """
    model, checkpoint, spec = config.model, config.checkpoint, config.spec
    parent = architecture_at(config.parents[0])
    transformer: Any = getattr(model, "transformer", model)
    hybrid = hybrid_of(model)
    if hybrid is None and isinstance(model, HybridModelConfig | HybridModelProvider):
        raise SpecError(
            field="config.model.hybrid_layer_pattern",
            kind="missing",
            got="is missing, and a HybridModel needs it",
            fix="set it (hybrid_override_pattern and the ratios are older forms)",
        )
    virtual = transformer.virtual_pipeline_model_parallel_size
    if hybrid:
        hybrid.require_stages(transformer.pipeline_model_parallel_size, virtual or 1)
    check_spec(transformer, spec, hybrid, parent)
    check_gates(transformer, parent)
    if not checkpoint.save:
        raise SpecError(
            field="config.checkpoint.save",
            kind="missing",
            got="is missing, and the receipt is written there",
            fix="set it",
        )
    check_folder(checkpoint.save)
    if not checkpoint.load or not same_folder(checkpoint.load, checkpoint.save):
        raise SpecError(
            field="config.checkpoint.load",
            got=checkpoint.load,
            expected=f"{checkpoint.save}, as checkpoint.save, because a restart would upcycle again otherwise",
            fix="set both to the same folder",
        )
    if not is_whole(tensor := transformer.tensor_model_parallel_size, 1):
        raise SpecError(
            field="config.model.tensor_model_parallel_size", got=tensor, expected="1 or more", fix="set it to 1"
        )
    if rest := (model.vocab_size or 0) % tensor:
        raise SpecError(
            field="config.model.vocab_size",
            got=model.vocab_size,
            expected=(
                "a multiple of tensor_model_parallel_size, because Bridge does not pad a vocabulary that is set "
                f"({rest} rows are left over)"
            ),
            fix=(
                "give the model a vocab_size that tensor_model_parallel_size divides; added rows are filled with zeros"
            ),
        )
    if spec and isinstance(config.dataset, ChatDataset):
        check_balancing(transformer)
    if spec and transformer.moe_router_load_balancing_type == QUANTILES:
        _check_quantiles(config.dataset.seq_length * config.train.micro_batch_size, spec)
    is_interleaved = getattr(transformer, "moe_mlp_glu_interleave_size", None)
    saves_hf = is_interleaved and checkpoint.also_save_hf_checkpoint
    is_local = checkpoint.non_persistent_ckpt_type == "local"
    precision, optimizer = mixed_precision_of(config), config.optimizer
    has_own_type = precision is None and not optimizer.use_distributed_optimizer
    in_another_type = has_own_type and optimizer.bf16 and transformer.params_dtype == torch.float32
    untried = "this package has not been tested with this setting, which needs a GPU"
    overwrites = "this checkpoint would overwrite the upcycled weights"
    loads = [hook for hook in pre_wrap_hooks(model) if _name_of(hook) == _BRIDGES_LOADING]
    for name, got, why in (
        ("checkpoint.pretrained_checkpoint", checkpoint.pretrained_checkpoint, overwrites),
        ("checkpoint.load", is_hf_checkpoint_dir(checkpoint.load) and checkpoint.load, overwrites),
        ("checkpoint.finetune", checkpoint.finetune, "a restart would begin at step 0 and overwrite the weights"),
        ("checkpoint.non_persistent_ckpt_type", is_local and "local", "no rank sees the checkpoints of other ranks"),
        (
            "checkpoint.also_save_hf_checkpoint",
            saves_hf,
            "Bridge exports the interleaved rows of experts without reordering them",
        ),
        (
            "checkpoint.also_save_hf_checkpoint",
            hybrid and checkpoint.also_save_hf_checkpoint,
            "Bridge exports a HybridModel with its own layer numbers; nemo-upcycle export writes the parent's class",
        ),
        (
            "optimizer.bf16",
            in_another_type,
            "the weights are in float32, so a checkpoint would find no bf16 parameter",
        ),
        ("peft", config.peft, "upcycling trains all weights"),
        ("dist.use_megatron_fsdp", config.dist.use_megatron_fsdp or config.ddp.use_megatron_fsdp, untried),
        ("dist.use_torch_fsdp2", config.dist.use_torch_fsdp2, untried),
        (
            "dist.use_decentralized_pg",
            config.dist.use_decentralized_pg,
            "process groups are then not in parallel_state",
        ),
        (
            "model.init_model_with_meta_device",
            model.init_model_with_meta_device,
            "parameters on the meta device cannot be filled",
        ),
    ):
        if got:
            raise SpecError(
                field=f"config.{name}", kind="refused", got="cannot be set", expected=why, fix="omit this setting"
            )
    check_masters(precision, optimizer, "config.optimizer.use_precision_aware_optimizer")
    if loads:
        raise SpecError(
            field="config.model",
            kind="refused",
            got=(
                f"loads a Hugging Face model itself ({_BRIDGES_LOADING}), and its weights would overwrite the"
                " upcycled weights"
            ),
            fix="make config.model with to_megatron_provider(load_weights=False)",
        )
    if spec and checkpoint.also_save_hf_checkpoint:
        _check_template(checkpoint.hf_source_path, spec)


def _check_quantiles(tokens: int, spec: UpcycleSpec) -> None:
    """Check that the quantiles of a micro-batch exist: all experts must be able to get equally many tokens."""
    if rest := tokens * spec.top_k % spec.num_experts:
        raise SpecError(
            field="config.train.micro_batch_size",
            kind="refused",
            got=(
                f"gives {tokens} tokens x {spec.top_k} experts, which {spec.num_experts} experts cannot share equally "
                f"(remainder {rest}), and {QUANTILES} needs equal shares"
            ),
            fix="change <config.train.micro_batch_size> or config.dataset.seq_length",
        )


def _check_template(source: str | None, spec: UpcycleSpec) -> None:
    """Check that Bridge's exports have a Hugging Face folder of the model's class, and register the conversions."""
    from nemo_upcycle.trainers.bridge.conversion import require_unfolded

    experts = read_architecture(Path(source)).num_experts if source and Path(source).is_dir() else spec.num_experts
    if not source or experts != spec.num_experts:
        raise SpecError(
            field="config.checkpoint.hf_source_path",
            got=f"{source}, a model with {experts or 'no'} experts" if source else "missing",
            expected=f"a folder with {spec.num_experts} experts, from which Bridge takes names and configuration",
            fix="make such a folder with nemo-upcycle convert",
        )
    hf_class = read_architecture(Path(source)).hf_class
    require_unfolded(hf_class, read_config(Path(source)), spec.routed_scaling_factor)


def _name_of(hook: Any) -> str:
    """Return the name of a function or method, also inside a `functools.partial`."""
    return getattr(getattr(hook, "func", hook), "__name__", "")


def _goes_on(config: UpcyclingConfig, paths: Sequence[Path]) -> bool:
    """Return whether the run has a checkpoint that Bridge will load; only the first rank looks.

    Raises:
        UpcycleError: the checkpoint was not made from this parent and this spec.
    """
    verdict: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            folder = config.checkpoint.load
            verdict[0] = checkpoint_exists(folder) or _has_global_non_persistent_checkpoint(folder, config.checkpoint)
            if verdict[0]:
                _check_receipt(config.checkpoint.save, paths, config.spec)
                show_messages().info("%s: the run resumes from its checkpoint and does not upcycle again", folder)
        except UpcycleError as error:
            verdict[0] = error
    torch.distributed.broadcast_object_list(verdict)
    if isinstance(verdict[0], UpcycleError):
        raise verdict[0]
    if verdict[0]:
        load_trusted(config.checkpoint)
    return bool(verdict[0])


def _check_receipt(folder: str, paths: Sequence[Path], spec: UpcycleSpec | None) -> None:
    """Check that the run to resume was made from this dense checkpoint with this spec."""
    made = load_receipt(folder)
    if made is None:
        raise UpcycleError(
            f"Folder {folder}",
            kind="state",
            got=f"has checkpoints without a {RECEIPT}, so they were not made by upcycling",
            fix="give config.checkpoint.save and .load another folder",
        )
    if any("Megatron-Bridge" in record["made_by"] for record in made.get("parameters", [])):
        raise UpcycleError(
            f"{folder}/{RECEIPT}",
            kind="refused",
            got="names a parent that needs Megatron-Bridge's own mapping, which release 0.3 does not use",
            fix=f"start in a new folder. {FINISH_WITH_0_2}",
        )
    made_by, wanted = made.get("spec"), spec.to_dict() if spec else None
    if made_by and spec:  # the fields that differ say more than all fields
        before, now = asdict(UpcycleSpec(**made_by)), asdict(spec)
        changed = [field for field in now if before[field] != now[field]]
        made_by, wanted = ({field: one[field] for field in changed} for one in (before, now))
    dense = paths[0].resolve()
    same = dense == Path(made.get("source", "")).resolve()
    found = _source_files(dense) if same and len(paths) == 1 else None
    for name, got, expected, differs in (
        ("spec", made_by, wanted, made_by != wanted),
        ("source", made.get("source"), str(dense), not same),
        ("source_files", made.get("source_files"), found, found not in (None, made.get("source_files"))),
    ):
        if differs:
            raise UpcycleError(
                f"{name} of {folder}/{RECEIPT}",
                kind="changed",
                got=f"{got} became {expected}",
                expected="the run started",
                fix=f"continue with the same {name}, or start in a new folder",
            )


def _source_files(dense: Path) -> dict[str, str] | None:
    """Return stamps that identify the files of the dense checkpoint; None if the checkpoint is no longer there."""
    try:
        with open_dense(dense) as source:
            return source.fingerprint()
    except UpcycleError:
        return None
