"""Upcycling inside NeMo: a restore configuration that names a dense checkpoint, and the strategy that executes it.

NeMo's `AutoResume` passes the restore configuration to the strategy only if the run has no checkpoint of its own yet.
So a restarted run resumes and never upcycles twice. Model and config classes stay NeMo's, so plain NeMo opens the
checkpoints that the run writes.
"""

# Do not postpone annotations here, and use Optional: NeMo-Run needs them to parse `resume.restore_config.path=...`.

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from nemo import lightning as nl
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from nemo.utils.app_state import AppState

from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.cpu.configuration import configure_for_cpu
from nemo_upcycle.errors import SpecError
from nemo_upcycle.online.receipt import UpcycleReceipt
from nemo_upcycle.online.upcycle import fill_chunks, merge_receipts
from nemo_upcycle.sources.checkpoint_context import read_context
from nemo_upcycle.sources.fetch import ensure_dense
from nemo_upcycle.sources.megatron_checkpoint import is_megatron
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.aux_loss import correct_losses
from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.trainers.layout import layout_of
from nemo_upcycle.trainers.lineage import has_new_rates
from nemo_upcycle.trainers.nemo.imports import quiet_lightning
from nemo_upcycle.trainers.nemo.nemo_signatures import repair_signatures
from nemo_upcycle.trainers.nemo.new_rates import apply_rates, group_settings
from nemo_upcycle.trainers.resharding import load_other_chains
from nemo_upcycle.trainers.settings import check_masters, setting
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.progress import show_messages


quiet_lightning()  # before a trainer is made with this strategy
repair_signatures()  # before the first configuration of a class is made, because fiddle caches the signature


@dataclass(kw_only=True)
class UpcycleConfig(RestoreConfig):
    """The `AutoResume.restore_config` of a run that starts from a dense checkpoint.

    Args:
        path: dense checkpoint: a folder, `hf://organisation/model`, `asset://smollm2-135m`, or
            `nemo:///absolute/path` (NeMo 2, Megatron). If the checkpoint is not on this machine yet, it is fetched
            into the cache before the weights are read.
        spec: how to upcycle the dense checkpoint; None: train the dense model itself further.
        branches: further dense checkpoints of the same architecture, named like `path`. The experts are copies of the
            first checkpoint, the second, and so on in turn (Branch-Train-MiX).
        checkpoint: checkpoint of a training of the same model, or the folder of such a run, to start from instead of
            upcycling `path`; only its weights are loaded. `path` and `spec` still say what the model was made from.
        non_expert_weights: with branches, the source of all other weights: the "first" checkpoint or the "mean" of
            all.

    Example:
        >>> recipe.resume.restore_config = run.Config(  # doctest: +SKIP
        ...     UpcycleConfig, path="/models/Llama-3-8B", spec=run.Config(UpcycleSpec, num_experts=8, top_k=2)
        ... )
    """

    path: str
    spec: Optional[UpcycleSpec] = None
    branches: Optional[list[str]] = None
    checkpoint: Optional[str] = None
    non_expert_weights: str = "first"
    load_artifacts: bool = False  # the folder has no NeMo context; the tokenizer comes with the data

    def __post_init__(self) -> None:
        # AutoResume accepts only nemo:// addresses in `path`, so `path` becomes the folder that will hold the model.
        self.path = str(_local(self.path))
        self.branches = [str(_local(branch)) for branch in self.branches or []]
        self.checkpoint = str(_checkpoint(Path(self.checkpoint).expanduser())) if self.checkpoint else None


def _local(source: str) -> Path:
    """Return the folder of a dense checkpoint, and fetch the checkpoint if needed."""
    if source.startswith("nemo://"):
        return Path(source.removeprefix("nemo://"))
    # The tokenizer comes with the data, so unlike a Hugging Face folder, a Megatron folder needs no tokenizer files.
    return Path(source) if is_megatron(Path(source)) else ensure_dense(source)


def _checkpoint(path: Path) -> Path:
    """Return the checkpoint at a path: the path itself, or the newest checkpoint of a run's folder.

    Raises:
        SpecError: the checkpoint has LoRA adapters, which would be lost.
    """
    found = path if (path / "weights").is_dir() else last_checkpoint(path.absolute())
    described = read_context(found)
    if described and "lora_alpha" in described.settings:
        raise SpecError(
            field="checkpoint",
            kind="refused",
            got=f"{found} has LoRA adapters, and only the run that made them can continue",
            fix="give the checkpoint that the tuning started from, or a run that trained all weights",
        )
    return found


class UpcycleStrategy(nl.MegatronStrategy):
    """NeMo's Megatron strategy, able to start from an `UpcycleConfig`.

    Takes the arguments of `nl.MegatronStrategy`. Without CUDA it also switches on the CPU backend.
    """

    def connect(self, model: pl.LightningModule) -> None:
        """Adapt the model to the machine, then connect it."""
        if use_cpu_backend():
            configure_for_cpu(model.config)
        super().connect(model)

    def setup_megatron_parallel(self, trainer: pl.Trainer) -> None:
        """Build and fill the chunks; skip the random initialisation if it would be overwritten at once."""
        model = self.model
        overwritten = isinstance(self.restore_config, UpcycleConfig) or bool(trainer.ckpt_path)
        with temporarily_set(model.config, "perform_initialization", False) if overwritten else nullcontext():
            super().setup_megatron_parallel(trainer)
        if not self._init_model_parallel:  # LoRA wraps a filled model's layers before NeMo wraps the chunks
            self._fill()
        self._auxiliary_losses = correct_losses(model.config)
        load_other_chains()

    def init_model_parallel(self) -> None:
        """Wrap the chunks, then fill them from the dense checkpoint before optimizers copy them as master weights."""
        super().init_model_parallel()
        if self._init_model_parallel:
            self._fill()

    def _fill(self) -> None:
        """Fill the chunks from the parent, unless the run starts from or resumes a trained checkpoint."""
        restore = self.restore_config
        if not isinstance(restore, UpcycleConfig) or self.trainer.ckpt_path or restore.checkpoint:
            return
        precision, optimizer = setting(self.precision_plugin, "dtype_config"), setting(self.model, "optim.config")
        check_masters(precision, optimizer, "optim.config.use_precision_aware_optimizer")
        _check_gather(self.ddp_config)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # Megatron's wrapper copies weights on a separate stream in NeMo
        chunks, paths = list(self.megatron_parallel), [restore.path, *(restore.branches or [])]
        if torch.distributed.get_rank() == 0:
            show_messages().info("parent: %s", ", ".join(paths))
        self._receipt = fill_chunks(chunks, paths, restore.spec, restore.non_expert_weights)

    def selective_restore(self) -> None:
        """Write the receipt of the upcycling, or load the weights of an earlier training."""
        restore = self.restore_config
        if not isinstance(restore, UpcycleConfig):
            super().selective_restore()
            return
        if restore.checkpoint:
            earlier = RestoreConfig(path=restore.checkpoint, load_artifacts=False)
            with temporarily_set(self, "restore_config", earlier):
                super().selective_restore()
            return
        receipt = self._receipt
        receipt.auxiliary_losses = self._auxiliary_losses
        layout = layout_of(self, torch.distributed.get_world_size())
        receipt.layout = {
            "tensor": layout.tp,
            "pipeline": layout.pp,
            "virtual_pipeline": layout.vp,
            "context": layout.cp,
            "expert": layout.ep,
            "expert_tensor": layout.etp,
            "data": layout.dp,
        }
        _report(receipt)
        self.barrier("UpcycleStrategy.selective_restore")

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any], selective_restore: bool = False) -> None:
        """Load the optimizer states, and fit the schedulers' parameter groups to this expert parallelism.

        The number of parameter groups depends on whether there is expert parallelism. A run that was rewound with
        other rates keeps its own rates.
        """
        settings = group_settings(self.optimizers)
        super().load_optimizer_state_dict(checkpoint, selective_restore)
        saved = checkpoint.get("lr_schedulers", ())
        if has_new_rates(Path(AppState().log_dir)):
            apply_rates(self.optimizers, settings, [one.scheduler for one in self.trainer.lr_scheduler_configs], saved)
            return
        for optimizer, scheduler in zip(self.optimizers, saved, strict=False):
            groups = optimizer.param_groups
            if len(scheduler.get("base_lrs", groups)) != len(groups):
                scheduler["base_lrs"] = [group["initial_lr"] for group in groups]
                scheduler["_last_lr"] = [group["lr"] for group in groups]


def _check_gather(ddp: Any) -> None:
    """Refuse to overlap gathering of MXFP8 parameters with computation, because NeMo 2.7 then zeroes all parameters.

    The parameters are gathered through the gradient buffer. Megatron-Core 0.15 expects the training loop to copy the
    master weights there (`MixedPrecisionOptimizer.step_with_ready_grads`), but NeMo's loop does not copy them.
    """
    if setting(ddp, "reuse_grad_buf_for_mxfp8_param_ag") and setting(ddp, "overlap_param_gather"):
        raise SpecError(
            field="trainer.strategy.ddp.overlap_param_gather",
            got=True,
            expected="False with parameters in MXFP8, because NeMo 2.7 would gather them too early",
            fix="set it to False, also in MegatronCommOverlapCallback",
        )


def _report(receipt: UpcycleReceipt) -> None:
    """Merge the receipts of all ranks, and write the result beside the run's logs on the first rank."""
    merged = merge_receipts(receipt)
    if merged is None:
        return
    merged.write(Path(AppState().log_dir) / "receipt.json")
    show_messages().info(
        "%.1fM -> %.1fM parameters, read %.2f GiB, wrote %.2f GiB in %.1f s on %d ranks",
        merged.dense_params / 1e6,
        merged.total_params / 1e6,
        merged.bytes_read / 2**30,
        merged.bytes_written / 2**30,
        merged.seconds,
        merged.ranks,
    )
