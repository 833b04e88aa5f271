"""NeMo's LoRA for upcycled models: low-rank adapters on attention and experts, the routers trained in full.

NeMo saves the adapters alone and finds the rest in the checkpoint that a run started from. An upcycled model has no
checkpoint before it is trained, so checkpoints are whole here: adapters stand beside their weights, and an export adds
them up.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import fiddle as fdl
import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from nemo.collections.llm.peft.lora import LoRA
from nemo.utils.callbacks.dist_ckpt_io import AsyncCompatibleCheckpointIO


@dataclass
class UpcycleLoRA(LoRA):
    """`llm.peft.LoRA` on a model that is upcycled as its training begins: `peft` of `llm.finetune`.

    Every expert has adapters of its own where each is a module of its own (`moe_grouped_gemm=False`); NeMo gives
    grouped experts one adapter together. Routers, which start alike for all tokens or at random, are trained in full.

    Takes the arguments of `llm.peft.LoRA`.

    Example:
        >>> recipe.peft = run.Config(UpcycleLoRA, dim=16, alpha=32)  # doctest: +SKIP
    """

    def freeze_model(self, model: torch.nn.Module) -> None:
        """Freeze all but the routers; what is recomputed passes gradients on only where its input has one."""
        super().freeze_model(model)
        for name, parameter in model.named_parameters():
            if ".mlp.router." in name:
                parameter.requires_grad = True
        for module in model.modules():
            if isinstance(module, LanguageModelEmbedding):
                module.register_forward_hook(_with_gradient)

    def get_wrappped_io(self) -> Any:
        """Return the class of the reader and writer of checkpoints, which writes whole ones."""
        return partial(_WholeCheckpoints, peft=self)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set up as NeMo does; a resumed run reads weights before it has adapters, and these with them."""
        super().setup(trainer, pl_module, stage)
        if recorded := getattr(getattr(pl_module, "__io__", None), "model_transform", None):
            fdl.update_callable(recorded, LoRA)  # so that plain NeMo opens the checkpoints
        self.wrapped_io.resumed = trainer.ckpt_path


# NeMo's are postponed: NeMo-Run would not know that `peft.dim=16` is a number.
UpcycleLoRA.__init__.__annotations__.update(get_type_hints(LoRA))


def _with_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Return the output of a frozen embedding, as a forward hook, with a gradient that nobody reads."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


class _WholeCheckpoints(_WrappingCheckpointIO, AsyncCompatibleCheckpointIO):
    """Writes weights and adapters, and tells NeMo's LoRA which checkpoint has its adapters.

    Args:
        checkpoint_io: reader and writer of checkpoints.
        peft: not needed.
    """

    resumed: Any = None
    model_ckpt_path: Any = None

    def __init__(self, checkpoint_io: Any = None, peft: Any = None) -> None:
        super().__init__(checkpoint_io)

    @property
    def adapter_ckpt_path(self) -> Path | None:
        """The checkpoint that the run goes on from; None for one that begins."""
        return Path(self.resumed) if self.resumed else None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> Any:
        """Write a checkpoint, whole."""
        inner: Any = self.checkpoint_io
        return inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read what is asked for."""
        inner: Any = self.checkpoint_io
        read: dict[str, Any] = inner.load_checkpoint(path, *args, **kwargs)
        return read
