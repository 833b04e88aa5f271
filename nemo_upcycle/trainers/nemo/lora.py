"""NeMo's LoRA for upcycled models: low-rank adapters on attention and experts, while the routers are trained in full.

NeMo saves only the adapters and finds the other weights in the checkpoint that the run started from. An upcycled model
has no checkpoint before it is trained. So this package's LoRA checkpoints are complete: they hold the weights and the
adapters side by side, and an export adds the adapters to the weights.
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
    """`llm.peft.LoRA` for a model that is upcycled when its training starts; pass it as `peft` to `llm.finetune`.

    Every expert gets its own adapters if every expert is a separate module (`moe_grouped_gemm=False`). NeMo gives
    grouped experts one shared adapter. Routers start at zero or at random, so they are trained in full.

    Takes the arguments of `llm.peft.LoRA`.

    Example:
        >>> recipe.peft = run.Config(UpcycleLoRA, dim=16, alpha=32)  # doctest: +SKIP
    """

    def freeze_model(self, model: torch.nn.Module) -> None:
        """Freeze all weights except the routers, and let gradients pass through recomputed layers.

        A recomputed layer passes gradients on only if its input requires a gradient. So the output of the frozen
        embedding must require a gradient.
        """
        super().freeze_model(model)
        for name, parameter in model.named_parameters():
            if ".mlp.router." in name:
                parameter.requires_grad = True
        for module in model.modules():
            if isinstance(module, LanguageModelEmbedding):
                module.register_forward_hook(_with_gradient)

    def get_wrappped_io(self) -> Any:
        """Return the class that reads and writes complete checkpoints."""
        return partial(_WholeCheckpoints, peft=self)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set up as NeMo does, and note the checkpoint from which a resumed run reads its adapters.

        A resumed run reads the weights first. Once the adapters exist, the run reads them from the same checkpoint.
        """
        super().setup(trainer, pl_module, stage)
        if recorded := getattr(getattr(pl_module, "__io__", None), "model_transform", None):
            fdl.update_callable(recorded, LoRA)  # so that plain NeMo opens the checkpoints
        self.wrapped_io.resumed = trainer.ckpt_path


# NeMo's annotations are postponed. Without this line NeMo-Run would not know that `peft.dim=16` is a number.
UpcycleLoRA.__init__.__annotations__.update(get_type_hints(LoRA))


def _with_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Make a frozen embedding's output require a gradient that nobody reads. For use as a forward hook."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


class _WholeCheckpoints(_WrappingCheckpointIO, AsyncCompatibleCheckpointIO):
    """Writes weights and adapters, and tells NeMo's LoRA which checkpoint has the adapters.

    Args:
        checkpoint_io: reader and writer of checkpoints.
        peft: unused; NeMo passes it.
    """

    resumed: Any = None
    model_ckpt_path: Any = None

    def __init__(self, checkpoint_io: Any = None, peft: Any = None) -> None:
        super().__init__(checkpoint_io)

    @property
    def adapter_ckpt_path(self) -> Path | None:
        """The checkpoint that the run resumes from; None for a new run."""
        return Path(self.resumed) if self.resumed else None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> Any:
        """Write a complete checkpoint."""
        inner: Any = self.checkpoint_io
        return inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the requested tensors of a checkpoint."""
        inner: Any = self.checkpoint_io
        read: dict[str, Any] = inner.load_checkpoint(path, *args, **kwargs)
        return read
