"""Upcycling inside NeMo: a restore configuration that names a dense checkpoint, and the strategy that acts on it.

NeMo's `AutoResume` hands the restore configuration to the strategy only when the run has no checkpoint of its own yet,
so a restarted run resumes and never upcycles twice. Model and config classes stay NeMo's: the checkpoints that the
run writes open in plain NeMo.
"""

# No postponed annotations, and Optional: NeMo-Run parses `resume.restore_config.path=...` by them.

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
from nemo_upcycle.trainers.nemo.imports import quiet_lightning
from nemo_upcycle.trainers.nemo.nemo_signatures import repair_signatures
from nemo_upcycle.trainers.resharding import load_other_chains
from nemo_upcycle.trainers.settings import check_masters, setting
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.progress import show_messages


quiet_lightning()  # before a trainer is made with this strategy
repair_signatures()  # before the first configuration of a class is made: fiddle keeps what it saw then


@dataclass(kw_only=True)
class UpcycleConfig(RestoreConfig):
    """What `AutoResume.restore_config` is for a run that starts from a dense Hugging Face checkpoint.

    Args:
        path: the dense checkpoint: a folder, `hf://organisation/model`, `asset://smollm2-135m`, or
            `nemo:///absolute/path` (NeMo 2, Megatron). What is not on this machine yet is fetched into the cache
            before the weights are read.
        spec: how to upcycle it; None loads it into a dense model as it is (continued training of the parent).
        branches: further dense checkpoints of the same architecture, named as `path` is: the experts are copies of the
            first, the second ... in turn (Branch-Train-MiX).
        checkpoint: a checkpoint of a training of the same model, or the folder of such a run, to start from in place
            of what `path` makes; only its weights are taken. `path` and `spec` still say what the model was made of.
        non_expert_weights: with branches, where all other weights come from: the "first" checkpoint or the "mean" of
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
    load_artifacts: bool = False  # the folder holds no NeMo context; the tokenizer comes with the data

    def __post_init__(self) -> None:
        # AutoResume accepts no address but nemo:// in `path`; it gets the folder in which the model will be.
        self.path = str(_local(self.path))
        self.branches = [str(_local(branch)) for branch in self.branches or []]
        self.checkpoint = str(_checkpoint(Path(self.checkpoint).expanduser())) if self.checkpoint else None


def _local(source: str) -> Path:
    """Return the folder of a dense checkpoint, fetched where needed."""
    if source.startswith("nemo://"):
        return Path(source.removeprefix("nemo://"))
    # The tokenizer comes with the data: unlike a Hugging Face folder, this one need not hold its files.
    return Path(source) if is_megatron(Path(source)) else ensure_dense(source)


def _checkpoint(path: Path) -> Path:
    """Return a checkpoint: the path itself, or the newest that a run left in its folder.

    Raises:
        SpecError: it has LoRA's adapters, which would be left out.
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

    Takes the arguments of `nl.MegatronStrategy`. On a machine without CUDA it also switches the CPU backend on.
    """

    def connect(self, model: pl.LightningModule) -> None:
        """Adapt the model to the machine, then connect it."""
        if use_cpu_backend():
            configure_for_cpu(model.config)
        super().connect(model)

    def setup_megatron_parallel(self, trainer: pl.Trainer) -> None:
        """Build and fill the chunks, without a random initialisation that would be overwritten at once."""
        model = self.model
        overwritten = isinstance(self.restore_config, UpcycleConfig) or bool(trainer.ckpt_path)
        with temporarily_set(model.config, "perform_initialization", False) if overwritten else nullcontext():
            super().setup_megatron_parallel(trainer)
        if not self._init_model_parallel:  # LoRA wraps linear layers of a filled model, before NeMo wraps the chunks
            self._fill()
        self._auxiliary_losses = correct_losses(model.config)
        load_other_chains()

    def init_model_parallel(self) -> None:
        """Wrap the chunks, then fill them from the dense checkpoint, before optimizers make master weights of them."""
        super().init_model_parallel()
        if self._init_model_parallel:
            self._fill()

    def _fill(self) -> None:
        """Fill the chunks from the parent, unless the run goes on from a checkpoint."""
        restore = self.restore_config
        if not isinstance(restore, UpcycleConfig) or self.trainer.ckpt_path or restore.checkpoint:
            return
        precision, optimizer = setting(self.precision_plugin, "dtype_config"), setting(self.model, "optim.config")
        check_masters(precision, optimizer, "optim.config.use_precision_aware_optimizer")
        _check_gather(self.ddp_config)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # NeMo lets Megatron's wrapper copy weights on a stream of its own
        chunks, paths = list(self.megatron_parallel), [restore.path, *(restore.branches or [])]
        if torch.distributed.get_rank() == 0:
            show_messages().info("parent: %s", ", ".join(paths))
        self._receipt = fill_chunks(chunks, paths, restore.spec, restore.non_expert_weights)

    def selective_restore(self) -> None:
        """Write the receipt of what was filled; or load the weights of an earlier training."""
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
        """Load the states; schedulers of another expert parallelism had more or fewer groups of parameters."""
        super().load_optimizer_state_dict(checkpoint, selective_restore)
        for optimizer, scheduler in zip(self.optimizers, checkpoint.get("lr_schedulers", ()), strict=False):
            groups = optimizer.param_groups
            if len(scheduler.get("base_lrs", groups)) != len(groups):
                scheduler["base_lrs"] = [group["initial_lr"] for group in groups]
                scheduler["_last_lr"] = [group["lr"] for group in groups]


def _check_gather(ddp: Any) -> None:
    """Refuse to gather parameters in MXFP8 while others compute: in NeMo 2.7 all would be zero.

    They are gathered through the buffer of gradients, and Megatron-Core 0.15 leaves it to the training loop to copy
    master weights there (`MixedPrecisionOptimizer.step_with_ready_grads`); NeMo's does not.
    """
    if setting(ddp, "reuse_grad_buf_for_mxfp8_param_ag") and setting(ddp, "overlap_param_gather"):
        raise SpecError(
            field="trainer.strategy.ddp.overlap_param_gather",
            got=True,
            expected="False with parameters in MXFP8, because NeMo 2.7 would gather them too early",
            fix="set it to False, also in MegatronCommOverlapCallback",
        )


def _report(receipt: UpcycleReceipt) -> None:
    """Merge the ranks' receipts; the first rank writes the result beside the run's logs."""
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
